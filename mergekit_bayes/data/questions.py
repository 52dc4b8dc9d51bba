"""Multiple-choice questions as tokens: the question with each of its choices, of which the choice is predicted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from mergekit_bayes.data.rows import Encoded, Row

__all__ = ["cut_question", "joined", "parted", "predicts_every_choice"]


def joined(choices: Sequence[Encoded], *, answer: int, sizes: Sequence[int]) -> Encoded:
    """One row of a question with each of its choices, behind one another.

    Args:
        choices: the question with each choice; targets are the tokens of the choice.
        answer: index of the right one.
        sizes: bytes of each choice.
    """
    return Encoded(
        np.concatenate([choice.tokens for choice in choices]),
        np.concatenate([_targets(choice) for choice in choices]),
        label=answer,
        segments=tuple(len(choice.tokens) for choice in choices),
        choice_bytes=tuple(sizes),
    )


def parted(row: Row) -> list[Row]:
    """The rows of a language model that a question is read as, one for each choice."""
    tokens, labels = row["input_ids"], row["labels"]
    assert isinstance(labels, list), "a question has targets"
    ends = list(itertools.accumulate(row["segments"]))
    return [
        Row(input_ids=tokens[start:end], labels=labels[start:end]) for start, end in zip([0, *ends], ends, strict=False)
    ]


def cut_question(row: Encoded, limit: int, *, kept: int) -> Encoded | None:
    """A question without its start, so that it fits with the longest of its choices.

    From every choice's row the same tokens are cut: choices are compared behind one and the same text.

    Args:
        row: of a question.
        limit: tokens of the question with any of its choices, at most.
        kept: tokens in front of every text, which stay.

    Returns:
        The shorter row; None where so little of a question would be left that a choice has nothing before it.
    """
    excess = row.width - limit
    pieces = list(_pieces(row))
    if any(_before(piece) - excess < max(1, kept) for piece in pieces):
        return None
    short = [
        Encoded(
            np.concatenate([piece.tokens[:kept], piece.tokens[kept + excess :]]),
            np.concatenate([_targets(piece)[:kept], _targets(piece)[kept + excess :]]),
        )
        for piece in pieces
    ]
    assert row.label is not None
    return joined(short, answer=row.label, sizes=row.choice_bytes or ())


def predicts_every_choice(row: Encoded) -> bool:
    """Whether each choice of a question has a token that is predicted."""
    return all(_targets(piece).any() for piece in _pieces(row))


def _pieces(row: Encoded) -> Iterator[Encoded]:
    ends = list(itertools.accumulate(row.segments or ()))
    for start, end in zip([0, *ends], ends, strict=False):
        yield Encoded(row.tokens[start:end], _targets(row)[start:end])


def _before(piece: Encoded) -> int:
    """Tokens in front of the first that is predicted."""
    return int(np.argmax(_targets(piece)))


def _targets(row: Encoded) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    assert row.targets is not None
    return row.targets
