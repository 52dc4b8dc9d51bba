"""What people should know about an estimate beside its numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mergekit_bayes.estimate.passes import GroupSummary
from mergekit_bayes.estimate.rows import Feed
from mergekit_bayes.precision.rank import Shortfall

__all__ = ["notes_on"]

_STILL_MOVES = 0.25


def notes_on(feed: Feed, groups: Sequence[GroupSummary], *, weight_decay: float) -> list[str]:
    """Returns sentences about rows that are missing or skipped, factors without full rank, and estimates that move.

    Args:
        feed: the rows.
        groups: what was found.
        weight_decay: of the prior.
    """
    return [
        *_few_rows(feed),
        *_skipped(feed, groups),
        *_shortfalls([each for group in groups for each in group.shortfalls], weight_decay),
        *_moving(groups),
    ]


def _few_rows(feed: Feed) -> Iterator[str]:
    if len(feed.rows) < feed.num_examples:
        yield f"the data has {len(feed.rows)} rows; {feed.num_examples} were asked for"


def _skipped(feed: Feed, groups: Sequence[GroupSummary]) -> Iterator[str]:
    rows = sorted({row for group in groups for row in group.counts.skipped})
    if rows:
        names = ", ".join(feed.name(row) for row in rows[:5])
        more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
        yield f"skipped {names}{more}: gradients, inputs or logits are not finite"


def _shortfalls(found: Sequence[Shortfall], weight_decay: float) -> Iterator[str]:
    if not found:
        return
    layers = {each.layer for each in found}
    worst = max(found, key=lambda each: (each.dimension / max(1, each.bound), each.layer))
    yield (
        f"factors of {len(layers)} layers lack full rank: the {worst.factor} factor of {worst.layer} has "
        f"{worst.dimension} dimensions and was seen {worst.bound} times. Where they say nothing, a merge has the prior "
        f"(weight_decay {weight_decay:g}) and its own shrinkage alone; a larger num_examples fills them"
    )


def _moving(groups: Sequence[GroupSummary]) -> Iterator[str]:
    medians = [changes[-1].median for group in groups for changes in group.changes if changes]
    if medians and max(medians) > _STILL_MOVES:
        yield (
            f"the estimate moved by {max(medians):.0%} over the last half of the rows; a larger num_examples makes "
            "it steadier"
        )
