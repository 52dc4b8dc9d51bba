"""Rows to evaluate on: read, checked against a model, and cut into batches that no number of processes changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_bayes.checkpoint.files import shown
from mergekit_bayes.data import (
    IGNORED,
    Row,
    Rows,
    Task,
    TrainingData,
    collate,
    load_training_data,
    misfit,
    packing_fault,
)
from mergekit_bayes.data.rows import Encoded, mixture
from mergekit_bayes.errors import EvaluateError

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.data.read import Tables
    from mergekit_bayes.model import LoadedModel
    from mergekit_bayes.recipe.evaluation_data import EvaluationDataSpec

__all__ = ["Feed", "check_rows", "read_rows", "spread", "target_bytes"]

_PARTIAL = "\N{REPLACEMENT CHARACTER}"


def read_rows(
    spec: EvaluationDataSpec,
    tokenizer: Any,
    *,
    task: Task,
    labels: Sequence[str] | None,
    recipe_dir: Path | None = None,
    tables: Tables | None = None,
) -> TrainingData:
    """Reads the rows of an evaluation.

    Args:
        spec: the section `data` of a recipe.
        tokenizer: of transformers.
        task: what the model does.
        labels: of a classification, in the order of the model's outputs; None for language models.
        recipe_dir: where relative paths may start beside the current directory.
        tables: data sets in memory, by the path that stands for them in the recipe.

    Returns:
        All rows under `train`; its parts are the data sets.

    Raises:
        DataError: they cannot be read, none is left, or a label is none of `labels`.
    """
    learned = spec.as_learned().model_copy(update={"labels": None if labels is None else tuple(labels)})
    return load_training_data(learned, tokenizer, task=task, recipe_dir=recipe_dir, tables=tables)


def spread(rows: Rows, most: int | None) -> Rows:
    """Returns at most so many rows of every data set, evenly spread over all of them.

    Args:
        rows: of all data sets.
        most: of each; None for all.
    """
    if most is None or all(len(part) <= most for part in rows.parts):
        return rows
    taken = []
    for part in rows.parts:
        places = np.unique(np.linspace(part.start, part.stop - 1, min(most, len(part))).round().astype(int))
        taken.append((part.name, [_encoded(rows[int(place)]) for place in places], None))
    return mixture(taken, task=rows.task)


def _encoded(row: Row) -> Encoded:
    labels, types, segments = row["labels"], row.get("token_type_ids"), row.get("segments")
    sizes = row.get("choice_bytes")
    return Encoded(
        np.array(row["input_ids"], dtype=np.int32),
        targets=np.array(labels) != IGNORED if isinstance(labels, list) else None,
        label=labels if isinstance(labels, int) else row.get("answer"),
        token_types=None if types is None else np.array(types, dtype=np.int32),
        segments=None if segments is None else tuple(segments),
        choice_bytes=None if sizes is None else tuple(sizes),
    )


def check_rows(rows: Rows, loaded: LoadedModel, name: str) -> None:
    """Refuses rows that a model has no place for.

    Args:
        rows: as its tokenizer reads them.
        loaded: the model.
        name: how messages call it.

    Raises:
        EvaluateError: a token beyond the vocabulary, a row beyond the last position, or packed rows that would see each
            other.
    """
    longest = int(rows.widths.max(initial=0))
    fault = misfit(
        name,
        largest_token=rows.largest_token,
        longest=longest,
        vocabulary=loaded.vocabulary,
        longest_row=loaded.longest_row,
    )
    if fault is not None:
        raise EvaluateError(fault)
    if rows.packed:
        fault = packing_fault(loaded.model, vocabulary=rows.largest_token + 1, flatten=False)
        if fault is not None:
            raise EvaluateError(f"data.packing: {shown(name)} cannot read packed rows: {fault}")


@dataclass(frozen=True)
class Feed:
    """Cuts rows into batches, and batches into blocks that are evaluated, and remembered, as one.

    Neither depends on the number of processes or on what is done already: a row always meets the same neighbours, and
    its numbers are the same to the bit.

    Attributes:
        rows: all of them.
        batch_size: rows in one forward pass; of questions as many as have no more choices, one at least.
        pad_token_id: fills up short rows.
    """

    rows: Rows
    batch_size: int
    pad_token_id: int

    @property
    def batches(self) -> list[list[int]]:
        """Indices of the rows of every batch; long rows first, those of similar length together."""
        order = np.argsort(-self.rows.widths, kind="stable").tolist()
        counts, found, room = self.rows.counts.tolist(), list[list[int]](), 0
        for index in order:
            if counts[index] > room:
                found.append([])
                room = self.batch_size
            found[-1].append(index)
            room -= counts[index]
        return found

    def blocks(self, most: int) -> list[list[list[int]]]:
        """The batches in at most so many blocks of as many batches each, the last one of fewer."""
        batches = self.batches
        size = max(1, -(-len(batches) // most))
        return [batches[start : start + size] for start in range(0, len(batches), size)]

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of some rows."""
        chosen = [self.rows[index] for index in indices]
        return collate(chosen, pad_token_id=self.pad_token_id, task=self.rows.task)


def target_bytes(rows: Rows, tokenizer: Any) -> list[int]:
    """The bytes (UTF-8) of the text that the predicted tokens of each row stand for, without special tokens.

    A run of targets counts what decoding says of everything up to its end, less everything before it; so blanks that
    only decode inside a text count, and a character that is cut in two counts where it ends.

    Args:
        rows: of a language model.
        tokenizer: that made them.
    """
    return [sum(_bytes_of(row, span, tokenizer) for span in _spans(row)) for row in rows]


def _spans(row: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Start and end of every run of targets."""
    marks = np.array(row["labels"]) >= 0
    edges = np.flatnonzero(np.diff(np.concatenate([[False], marks, [False]]).astype(np.int8)))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def _bytes_of(row: Mapping[str, Any], span: tuple[int, int], tokenizer: Any) -> int:
    start, end = (_length(row["input_ids"][:place], tokenizer) for place in span)
    return end - start


def _length(tokens: list[int], tokenizer: Any) -> int:
    text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return len(text.rstrip(_PARTIAL).encode())
