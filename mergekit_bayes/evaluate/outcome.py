"""One model looked at in one way: its numbers, and everything they are to be read with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mergekit_bayes.evaluate.candidate import Candidate
from mergekit_bayes.evaluate.encodings import Encoding
from mergekit_bayes.evaluate.measure import Measured
from mergekit_bayes.evaluate.variants import Variant

__all__ = ["Outcome", "comparable"]

_OF_TOKENS = ("loss", "perplexity")


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of it.

    Attributes:
        candidate: the model.
        variant: how it was looked at; samples have their temperature.
        encoding: the rows.
        key: of what the numbers depend on.
        measured: by row.
        chosen: how validation data chose the temperature, as plain data; None where they did not.
        note: what was pruned; None where nothing was.
    """

    candidate: Candidate
    variant: Variant
    encoding: Encoding
    key: str
    measured: Measured
    chosen: Mapping[str, Any] | None = None
    note: str | None = None

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.variant.title(self.candidate.title)


def comparable(one: Outcome, other: Outcome, metric: str) -> bool:
    """Whether a score of two models is of the same rows and in the same unit, so that their difference means something.

    A token of one tokenizer is another unit than a token of another.

    Args:
        one: a model.
        other: another one.
        metric: name of the score.
    """
    if one.encoding.tokenizer == other.encoding.tokenizer:
        return True
    if metric in _OF_TOKENS:
        return False
    return one.encoding.whole and other.encoding.whole and len(one.encoding.rows) == len(other.encoding.rows)
