"""Rows of tokens with labels, as training reads them: many rows in a few flat arrays.

A row is a token sequence and what is learned from it: for a causal language model the tokens that are predicted (its
targets), for classification the index of its label. A packed row is several short rows behind one another, its
segments, which do not see each other.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NotRequired, TypeAlias, TypedDict, overload

import numpy as np
from numpy.typing import NDArray

ModelTask: TypeAlias = Literal["causal_lm", "sequence_classification"]
"""What a model does: predict the next token, or one label per text."""

Task: TypeAlias = ModelTask | Literal["multiple_choice"]
"""What rows are for: what a model does, or to see which of several continuations a language model finds likeliest."""

Integers: TypeAlias = NDArray[np.int64]
Tokens: TypeAlias = NDArray[np.int32]
Marks: TypeAlias = NDArray[np.bool_]

IGNORED = -100
"""The label of a token that is not predicted, torch's and transformers' convention."""


class Row(TypedDict):
    """One row, in the words of transformers.

    `labels` is one label per token (the token itself where it is a target, else -100; models shift them by one), or
    the index of the row's class. `segments` holds the lengths of the segments of a packed row.

    A multiple-choice question is one row: the question with its first choice, the question with its second, and so on
    behind one another, with the lengths of these as `segments`; targets are the tokens of the choices. `answer` is the
    index of the right one, and `choice_bytes` counts the bytes (UTF-8) of each choice.
    """

    input_ids: list[int]
    labels: list[int] | int
    token_type_ids: NotRequired[list[int]]
    segments: NotRequired[list[int]]
    answer: NotRequired[int]
    choice_bytes: NotRequired[list[int]]


@dataclass(frozen=True, eq=False, slots=True)
class Encoded:
    """One tokenised row.

    Attributes:
        tokens: token ids, shape (length,).
        targets: which tokens are predicted, shape (length,); None for classification. Never the first token, which
            has nothing to be predicted from.
        label: index of the class, or of the right choice; None for a language model.
        token_types: which of two texts a token belongs to, for the tokenizers that say so.
        segments: lengths of the segments of a packed row, or of a question with each of its choices.
        choice_bytes: bytes of each choice; None for rows that are no question.
        key: digest of the text it came from.
    """

    tokens: Tokens
    targets: Marks | None = None
    label: int | None = None
    token_types: Tokens | None = None
    segments: tuple[int, ...] | None = None
    choice_bytes: tuple[int, ...] | None = None
    key: bytes = b""

    @property
    def width(self) -> int:
        """Tokens that a model reads at once: all, or those of the longest choice with its question."""
        return len(self.tokens) if self.choice_bytes is None else max(self.segments or ())


@dataclass(frozen=True)
class Part:
    """The rows of one data set among the rows of a mixture.

    Attributes:
        name: of the data set.
        start: index of its first row.
        stop: index behind its last row.
        weight: its share of the mixture, relative to the other parts'; None everywhere: every row once per epoch.
    """

    name: str
    start: int
    stop: int
    weight: float | None = None

    def __len__(self) -> int:
        return self.stop - self.start


class Rows(Sequence[Row]):
    """An immutable sequence of rows.

    Args:
        encoded: the rows.
        parts: the data sets they came from, in order and without gaps; one unnamed part unless given.
        task: what the rows are for.

    Attributes:
        parts: as given.
        task: as given.
        lengths: tokens of each row, shape (rows,).
        widths: tokens of each row that a model reads at once, shape (rows,): all, or those of a question with its
            longest choice.
        units: training units of each row, shape (rows,): its targets, or 1 for classification and for questions. The
            units of a loss that is summed over them.
    """

    def __init__(self, encoded: Sequence[Encoded], *, task: Task, parts: Sequence[Part] | None = None) -> None:
        self.task: Task = task
        self.parts: tuple[Part, ...] = (Part("", 0, len(encoded)),) if parts is None else tuple(parts)
        assert [part.start for part in self.parts] + [len(encoded)] == [0] + [part.stop for part in self.parts]
        self.lengths: Integers = np.array([len(row.tokens) for row in encoded], dtype=np.int64)
        self.widths: Integers = np.array([row.width for row in encoded], dtype=np.int64)
        self._starts: Integers = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])
        self._tokens = _joined([row.tokens for row in encoded], np.dtype(np.int32))
        self._labels: Integers | None = None
        self._targets: Marks | None = None
        self.units: Integers = np.ones(len(encoded), dtype=np.int64)
        if task != "sequence_classification":
            self._targets = _joined([_marks(row) for row in encoded], np.dtype(np.bool_))
        if task == "causal_lm":
            assert self._targets is not None
            before: Integers = np.concatenate([np.zeros(1, np.int64), np.cumsum(self._targets, dtype=np.int64)])
            self.units = before[self._starts[1:]] - before[self._starts[:-1]]
        else:
            self._labels = np.array([_class(row) for row in encoded], dtype=np.int64)
        types = [row.token_types for row in encoded if row.token_types is not None]
        assert len(types) in (0, len(encoded)), "token types for some rows only"
        self._types = _joined(types, np.dtype(np.int32)) if types else None
        segments = [row.segments for row in encoded if row.segments is not None]
        assert len(segments) in (0, len(encoded)), "some rows are packed and some are not"
        self._segments = tuple(segments) if segments else None
        sizes = [row.choice_bytes for row in encoded if row.choice_bytes is not None]
        assert len(sizes) == (len(encoded) if task == "multiple_choice" else 0), "bytes are those of choices"
        self._choice_bytes = tuple(sizes)

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self._row(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self._row(index % len(self))

    def __iter__(self) -> Iterator[Row]:
        return (self._row(i) for i in range(len(self)))

    @property
    def num_units(self) -> int:
        """Training units of all rows: predicted tokens, or examples for classification."""
        return int(self.units.sum())

    def num_units_of(self, indices: Iterable[int]) -> int:
        """Training units of some rows, counted as often as their index appears."""
        return int(self.units[np.fromiter(indices, dtype=np.int64)].sum())

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, predicted or not."""
        return int(self.lengths.sum())

    @property
    def packed(self) -> bool:
        """Whether a model reads several segments as one row."""
        return self._segments is not None and self.task != "multiple_choice"

    @property
    def counts(self) -> Integers:
        """What a model reads for each row, shape (rows,): one row of tokens, or one for every choice of a question."""
        if self.task != "multiple_choice":
            return np.ones(len(self), dtype=np.int64)
        return np.array([len(sizes) for sizes in self._choice_bytes], dtype=np.int64)

    @property
    def largest_token(self) -> int:
        """The highest token id; the model's embedding must have more rows than this."""
        return int(self._tokens.max()) if len(self._tokens) else 0

    @property
    def fingerprint(self) -> str:
        """Digest of every token, target, label, segment and share: equal for equal training data only."""
        digest = hashlib.blake2b(digest_size=16)
        shares = [(part.start, part.stop, part.weight) for part in self.parts]
        choices = (self._choice_bytes,) if self._choice_bytes else ()
        digest.update(repr((self.task, shares, self._segments, *choices)).encode())
        for array in (self._starts, self._tokens, self._targets, self._labels, self._types):
            if array is not None:
                digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
        return digest.hexdigest()

    def _row(self, index: int) -> Row:
        span = slice(self._starts[index], self._starts[index + 1])
        tokens = self._tokens[span]
        if self._targets is not None:
            row = Row(input_ids=tokens.tolist(), labels=np.where(self._targets[span], tokens, IGNORED).tolist())
        else:
            assert self._labels is not None
            row = Row(input_ids=tokens.tolist(), labels=int(self._labels[index]))
        if self._types is not None:
            row["token_type_ids"] = self._types[span].tolist()
        if self._segments is not None:
            row["segments"] = list(self._segments[index])
        if self._choice_bytes:
            assert self._labels is not None
            row |= {"answer": int(self._labels[index]), "choice_bytes": list(self._choice_bytes[index])}
        return row


def mixture(parts: Sequence[tuple[str, Sequence[Encoded], float | None]], *, task: Task) -> Rows:
    """Rows of several data sets.

    Args:
        parts: for each data set its name, its rows and its weight.
        task: what the rows are for.
    """
    stops = list(itertools.accumulate(len(rows) for _, rows, _ in parts))
    spans = zip(parts, [0, *stops], stops, strict=False)
    return Rows(
        [row for _, rows, _ in parts for row in rows],
        task=task,
        parts=[Part(name, start, stop, weight) for (name, _, weight), start, stop in spans],
    )


def model_task(task: Task) -> ModelTask:
    """What a model does that rows for a task are for."""
    return "causal_lm" if task == "multiple_choice" else task


def _joined(arrays: Sequence[NDArray[np.generic]], dtype: np.dtype[np.generic]) -> NDArray:  # type: ignore[type-arg]
    return np.concatenate(arrays).astype(dtype, copy=False) if arrays else np.zeros(0, dtype)


def _marks(row: Encoded) -> Marks:
    assert row.targets is not None
    assert len(row.targets) == len(row.tokens)
    assert not row.targets[:1].any(), "the first token of a row cannot be predicted"
    return row.targets


def _class(row: Encoded) -> int:
    assert row.label is not None
    return row.label
