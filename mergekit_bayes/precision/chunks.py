"""Cutting a collated batch into chunks of rows, with what each row's loss depends on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import cast

from torch import Tensor
from torch.nn.functional import pad

from mergekit_bayes.errors import DataError

__all__ = ["IGNORED", "Chunk", "chunks"]

IGNORED = -100
"""Label where there is no loss."""


@dataclass(frozen=True)
class Chunk:
    """A few rows of a batch.

    Attributes:
        inputs: of the model, by name.
        wanted: what the logits predict, IGNORED where nothing: (rows, tokens) of a language model, where the logits at
            token t predict token t + 1, or (rows,) of a classifier; on the CPU.
        numbers: of the rows in the data.
    """

    inputs: Mapping[str, Tensor]
    wanted: Tensor
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def units(self) -> int:
        """Predicted tokens, or rows of a classifier that have a label."""
        return int((self.wanted != IGNORED).sum())

    @property
    def seen(self) -> Tensor | None:
        """Which tokens count as inputs of layers, (rows, tokens) bool, or None for all.

        Padding does not, and of a language model neither do tokens that no loss depends on, those after the last one
        that predicts something: the end of each row, and padding of packed rows, which have no attention mask.
        """
        attended = self.inputs.get("attention_mask")
        attended = None if attended is None or attended.dim() != 2 else attended.cpu() != 0
        if self.wanted.dim() == 1:
            return attended
        predicts = (self.wanted != IGNORED).int()
        seen = predicts.flip(1).cumsum(1).flip(1) > 0
        return seen if attended is None else seen & attended

    def single_rows(self) -> Iterator[Chunk]:
        """Cuts into chunks of one row each."""
        for n, number in enumerate(self.numbers):
            inputs = {name: value[n : n + 1] for name, value in self.inputs.items()}
            yield Chunk(inputs, self.wanted[n : n + 1], (number,))


def chunks(batch: Mapping[str, Tensor], size: int) -> Iterator[Chunk]:
    """Cuts the rows of a batch that have a label into chunks of at most `size`, in order.

    Args:
        batch: inputs of a model, `labels` and `row`, as `Estimator.update` takes them.
        size: at least 1.

    Raises:
        DataError: `labels` or `row` are missing or of another shape, or tensors disagree in the number of rows.
    """
    for name in ("labels", "row"):
        if name not in batch:
            raise DataError(f"a batch has {', '.join(batch)}; expected {name} among them")
    lengths = {name: len(value) for name, value in batch.items()}
    if len(set(lengths.values())) != 1:
        raise DataError(f"a batch must have as many rows in every tensor, got {lengths}")
    labels, numbers = batch["labels"].cpu(), cast("list[int]", batch["row"].tolist())
    if labels.dim() not in (1, 2) or batch["row"].dim() != 1:
        shapes = f"labels of shape {tuple(labels.shape)} and row of {tuple(batch['row'].shape)}"
        raise DataError(f"a batch has {shapes}; expected (rows, tokens) or (rows,), and (rows,)")
    wanted = pad(labels[:, 1:], (0, 1), value=IGNORED) if labels.dim() == 2 else labels
    inputs = {name: value for name, value in batch.items() if name not in ("labels", "row")}
    labelled = (wanted != IGNORED if wanted.dim() == 1 else (wanted != IGNORED).any(1)).nonzero().squeeze(1)
    for part in labelled.split(size) if len(labelled) else ():  # type: ignore[no-untyped-call]
        cut = {name: value[part.to(value.device)] for name, value in inputs.items()}
        yield Chunk(cut, wanted[part], tuple(numbers[n] for n in part.tolist()))
