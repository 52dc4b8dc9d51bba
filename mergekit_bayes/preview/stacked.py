r"""Several mixes of LoRA adapters in one forward pass, without a copy of the base's weights.

Where adapters are merged by scalar weights, every mix is the same stack of factors with a diagonal of its own,

    y = W x + B diag(c_mix) A x ,     A = [A_1; A_2; ...], B = [s_1 B_1, s_2 B_2, ...] ,

so a batch may hold rows of many mixes, each row with its own diagonal. The first layers see the same inputs for every
mix, as their embeddings are the same: there W x and A x are computed once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_bayes.checkpoint.reader import BlockReader
from mergekit_bayes.errors import EvaluateError
from mergekit_bayes.merge.operands import OperandReader
from mergekit_bayes.merge.steps import ModuleStep
from mergekit_bayes.preview.design import Mix
from mergekit_bayes.preview.form import form_of
from mergekit_bayes.preview.plans import MethodPlan

__all__ = ["StackedAdapters", "can_stack"]


def can_stack(method: MethodPlan, model: nn.Module) -> bool:
    """Whether the mixes of a method are one stack of factors on linear layers of a model."""
    plan = method.plan
    steps = [step for step in plan.steps if isinstance(step, ModuleStep)]
    if not steps or len(steps) < len(plan.steps) or form_of(plan.method, dict(steps[0].options)) != "sum":
        return False
    exact = all(step.mode == "stack" and step.truncate is None for step in steps)
    return exact and all(_is_linear(_module(model, step.name)) for step in steps)


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _is_linear(module: nn.Module | None) -> bool:
    # Conv1D of transformers computes x W + b, so what is added to its output is the same
    return type(module) is nn.Linear or type(module).__name__ == "Conv1D"


class _Layer(nn.Module):
    """A linear layer with the stacked factors beside it."""

    def __init__(self, base: nn.Module, a: Tensor, b: Tensor, owner: Tensor) -> None:
        super().__init__()
        self.base = base
        self.a, self.b_transposed, self.owner = a, b.T.contiguous(), owner
        self.diagonal = torch.empty(0)  # (rows, stacked rank), set before every forward pass
        self.mixes = 1  # that the rows are of, one mix after the other
        self._early: bool | None = (
            None  # whether its inputs were the same for all mixes, the first time there were several
        )

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, each row with its own mix."""
        rows = len(self.diagonal)
        if x.shape[0] != rows or x.dim() not in (2, 3):
            raise EvaluateError(
                f"a layer was given an input of shape {tuple(x.shape)} for {rows} rows; mixes can only share a forward "
                "pass where every layer sees rows first; set evaluation.mixes_per_batch: 1"
            )
        times = self.mixes if self._alike(x) else 1
        seen = x if times == 1 else x[: rows // times]
        y: Tensor = self.base(seen)
        inner = nn.functional.linear(seen.to(self.a.dtype), self.a)
        if times > 1:
            copies = (times, *[1] * (x.dim() - 1))
            y, inner = y.repeat(copies), inner.repeat(copies)
        inner.mul_(self.diagonal if x.dim() == 2 else self.diagonal[:, None])
        flat = y.view(-1, y.shape[-1])
        if flat.dtype == inner.dtype:
            flat.addmm_(inner.flatten(0, -2), self.b_transposed)
            return y
        return y + (inner @ self.b_transposed).to(y.dtype)

    def _alike(self, x: Tensor) -> bool:
        """Whether all mixes have the same inputs; looked at again only where they had before."""
        if self.mixes == 1 or self._early is False:
            return False
        first, *others = x.chunk(self.mixes)
        alike = all(torch.equal(first, other) for other in others)
        if self._early is None:
            self._early = alike
        return alike


class StackedAdapters:
    """The mixes of one method on a model in memory.

    Args:
        model: the base, which is only looked at.
        method: a method for which `can_stack` holds.
        dtype: what factors compute in; each is where its layer computes.
    """

    def __init__(self, model: nn.Module, method: MethodPlan, *, dtype: torch.dtype) -> None:
        self.model, self.method = model, method
        labels = sorted(source.label for source in method.plan.sources)
        places = [[source.label for source in method.plan.sources].index(label) for label in labels]
        self._layers: dict[str, _Layer] = {}
        owners: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
        with BlockReader() as reader, torch.no_grad():
            operands = OperandReader(reader, torch.float32, "cpu")
            for step in method.plan.steps:
                assert isinstance(step, ModuleStep)  # this is what `can_stack` says
                layer = model.get_submodule(step.name)
                device = _device_of(layer)
                pairs = [
                    (operands.factors(source.low_rank), place)
                    for source, place in zip(step.sources, places, strict=True)
                    if source is not None and source.low_rank is not None
                ]
                a = torch.cat([factors.a for factors, _ in pairs]).to(device, dtype)
                b = torch.cat([factors.b for factors, _ in pairs], dim=1).to(device, dtype)
                places_of_rows = tuple(place for factors, place in pairs for _ in range(len(factors.a)))
                # most layers have the same ones: what is chosen for a batch is chosen once for all of them
                owner = owners.setdefault((device, places_of_rows), torch.tensor(places_of_rows, device=device))
                self._layers[step.name] = _Layer(layer, a, b, owner)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The model computes mixes inside, and is what it was after."""
        for name, layer in self._layers.items():
            _replace(self.model, name, layer)
        try:
            yield
        finally:
            for name, layer in self._layers.items():
                _replace(self.model, name, layer.base)

    def choose(self, mixes: Sequence[Mix], rows: int) -> None:
        """Says what the next batch holds: so many rows of every mix, one mix after the other."""
        weights = torch.tensor([self.method.effective(mix) for mix in mixes], dtype=torch.float64)
        by_row = weights.repeat_interleave(rows, dim=0)
        diagonals: dict[Tensor, Tensor] = {}
        for layer in self._layers.values():
            if layer.owner not in diagonals:
                diagonals[layer.owner] = by_row.to(layer.a.device, layer.a.dtype)[:, layer.owner]
            layer.diagonal, layer.mixes = diagonals[layer.owner], len(mixes)


def _device_of(layer: Any) -> torch.device:
    """Where a layer computes: where its weights are, or where Accelerate brings those that it offloads."""
    hook = getattr(layer, "_hf_hook", None)
    place = getattr(hook, "execution_device", None) if layer.weight.is_meta else layer.weight.device
    return torch.device("cpu" if place is None else place)


def _replace(model: nn.Module, name: str, module: Any) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
