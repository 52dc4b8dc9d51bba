"""From rows to the tensors a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_bayes.data.questions import parted
from mergekit_bayes.data.rows import IGNORED, Row, Task

if TYPE_CHECKING:
    from torch import Tensor


def collate(rows: Sequence[Row], *, pad_token_id: int, task: Task, flatten: bool = False) -> dict[str, Tensor]:
    """One batch, padded on the right.

    Labels come from the rows, never from the tokens, so that a padding token which is also the end-of-sequence token
    is still learned where a row ends.

    Packed rows come without an attention mask. Their `position_ids` start over at every segment, which transformers
    reads as the segments not seeing each other, but only with `use_cache=False`: a model that keeps keys and values
    attends to everything before. `packing_fault` tries whether a model does it at all. Padding is a segment too.

    Args:
        rows: rows of `Rows`; none gives one row that teaches nothing, for a process that has nothing to do.
        pad_token_id: fills up short rows; any id the model knows, as nothing attends to it.
        task: what the rows are for.
        flatten: put all rows behind one another into a single one without padding, each a segment: what flash
            attention wants of packed rows.

    Returns:
        `input_ids` and `labels`, and `attention_mask` or `position_ids`, and `token_type_ids` where the rows have them;
        int64, shape (rows, longest row), `labels` of classification shape (rows,). Of questions, a row for each choice,
        `choices` of each question, shape (questions,), and `answers`, the index of the right one, shape (questions,).
    """
    import torch

    if task == "multiple_choice":
        pieces = [parted(row) for row in rows]
        batch = collate([piece for own in pieces for piece in own], pad_token_id=pad_token_id, task="causal_lm")
        batch["choices"] = torch.tensor([len(own) for own in pieces], dtype=torch.int64)
        return batch | {"answers": torch.tensor([row["answer"] for row in rows], dtype=torch.int64)}
    if not rows:
        rows = [Row(input_ids=[pad_token_id], labels=[IGNORED] if task == "causal_lm" else IGNORED)]
    if flatten:
        rows = [_flat(rows)]
    lengths = [len(row["input_ids"]) for row in rows]
    width = max(lengths)

    def padded(values: Sequence[Sequence[int]], filler: int) -> Tensor:
        return torch.tensor([[*line, *[filler] * (width - len(line))] for line in values], dtype=torch.int64)

    batch = {"input_ids": padded([row["input_ids"] for row in rows], pad_token_id)}
    labels = [row["labels"] for row in rows]
    token_labels = [line for line in labels if not isinstance(line, int)]
    batch["labels"] = padded(token_labels, IGNORED) if token_labels else torch.tensor(labels, dtype=torch.int64)
    if any("segments" in row for row in rows):
        batch["position_ids"] = torch.tensor([_positions(row, width) for row in rows], dtype=torch.int64)
    else:
        batch["attention_mask"] = padded([[1] * length for length in lengths], 0)
    if all("token_type_ids" in row for row in rows):
        batch["token_type_ids"] = padded([row["token_type_ids"] for row in rows], 0)
    return batch


def _positions(row: Row, width: int) -> list[int]:
    length = len(row["input_ids"])
    return [position for size in [*row.get("segments", [length]), width - length] for position in range(size)]


def _flat(rows: Sequence[Row]) -> Row:
    labels: list[int] = []
    for row in rows:
        assert not isinstance(row["labels"], int), "only rows of a language model can stand behind one another"
        labels += row["labels"]
    return Row(
        input_ids=[token for row in rows for token in row["input_ids"]],
        labels=labels,
        segments=[size for row in rows for size in row.get("segments", [len(row["input_ids"])])],
    )
