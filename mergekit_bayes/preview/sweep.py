"""Carry out a sweep: groups of mixes that share forward passes, in an order whose beginning covers the design."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_bayes.merge.processes import Processes
from mergekit_bayes.preview.cache import EvaluationCache, key_of
from mergekit_bayes.preview.design import Mix
from mergekit_bayes.preview.evaluators import Evaluated, Evaluations
from mergekit_bayes.preview.plans import MethodPlan

__all__ = ["Group", "groups_of", "run_groups", "within_budget"]

_ALONE = Processes()


@dataclass(frozen=True, eq=False)
class Group:
    """Mixes that share forward passes, always the same ones, so that their scores do not depend on who else runs.

    Attributes:
        method: of all of them.
        mixes: in the order in which they share a batch.
        keys: of their records.
        needed: whether it is evaluated whatever the budget says: base and experts, and references.
        reference: the place of the reference that it is; None for others.
    """

    method: MethodPlan
    mixes: tuple[Mix, ...]
    keys: tuple[str, ...]
    needed: bool = False
    reference: int | None = None

    @property
    def is_corner(self) -> bool:
        """Whether it is of base and experts."""
        return self.needed and self.reference is None


def groups_of(
    method: MethodPlan,
    mixes: Sequence[Mix],
    *,
    together: int,
    inputs: object,
    needed: bool = False,
    elsewhere: Collection[str] = (),
) -> list[Group]:
    """Cuts the mixes of one method into groups.

    Args:
        method: the method.
        mixes: in the order in which they are evaluated.
        together: mixes per group.
        inputs: what their scores depend on besides method and weights, as JSON.
        needed: as in `Group`.
        elsewhere: keys of mixes that are evaluated in other groups before; here they are in groups of their own.
    """
    keyed = [(mix, key_of(method.plan.job, mix, inputs)) for mix in mixes]
    parts = [[pair for pair in keyed if (pair[1] in elsewhere) == known] for known in (True, False)]
    cut = [part[start : start + together] for part in parts for start in range(0, len(part), together)]
    return [Group(method, tuple(m for m, _ in pairs), tuple(k for _, k in pairs), needed) for pairs in cut]


def within_budget(designs: Sequence[Sequence[Mix]], points: int | None) -> list[list[Mix]]:
    """The mixes of every method that a budget has room for: the first ones of each, the same number to within one.

    Args:
        designs: mixes of each method in order of spread.
        points: evaluated mixes of all methods together; None for all.
    """
    if points is None:
        return [list(mixes) for mixes in designs]
    kept: list[list[Mix]] = [[] for _ in designs]
    left = points
    for place in range(max(map(len, designs), default=0)):
        for mine, mixes in zip(kept, designs, strict=True):
            if place < len(mixes) and left > 0:
                mine.append(mixes[place])
                left -= 1
    return kept


def in_turns(groups: Sequence[Sequence[Group]]) -> Iterator[Group]:
    """One group of every method in turn, so that all methods are there when a sweep ends early."""
    for place in range(max(map(len, groups), default=0)):
        yield from (mine[place] for mine in groups if place < len(mine))


Report = Callable[[int], None]


def run_groups(
    groups: Sequence[Group],
    evaluations: Evaluations,
    cache: EvaluationCache,
    *,
    processes: Processes = _ALONE,
    late: Callable[[], bool] = lambda: False,
    stopped: Callable[[], bool] = lambda: False,
    report: Report = lambda _: None,
) -> None:
    """Evaluates what is not in the cache, and puts it there; every process calls this with the same groups.

    Groups are dealt to the processes as long as there is one for each of them. What is left over, such as a few mixes
    on many devices, is evaluated by all of them together, each on its share of the rows, if rows can be shared.

    Args:
        groups: in order.
        evaluations: does the work.
        cache: where records are.
        processes: that share the work.
        late: whether the time is over, so that no group is begun unless it is needed; looked at before each.
        stopped: whether somebody asked to stop; looked at between groups.
        report: told the number of mixes that are done, of all processes as far as one can tell, after every group.
    """

    def wanted(group: Group) -> bool:
        return not stopped() and (group.needed or not late())

    todo = _missing(groups, cache, processes)
    if len(todo) < len(groups):
        report(sum(len(group.mixes) for group in groups) - sum(len(group.mixes) for group in todo))
    dealt = len(todo) - (len(todo) % processes.count if evaluations.splits_rows else 0)
    for group in todo[processes.rank : dealt : processes.count]:
        if wanted(group):
            found = evaluations.evaluate(group.method, group.mixes)
            cache.add(_records(group, found))
            report(len(group.mixes) * processes.count)
    for group in todo[dealt:]:
        if all(processes.gathered(wanted(group))):
            found = evaluations.evaluate(group.method, group.mixes, processes)
            if processes.leader:
                cache.add(_records(group, found))
            report(len(group.mixes))


def _missing(groups: Sequence[Group], cache: EvaluationCache, processes: Processes) -> list[Group]:
    """What is not known yet, the same in every process: nobody writes while others read."""
    processes.barrier()
    known = {key for key, record in cache.read().items() if "error" not in record}
    processes.barrier()
    return [group for group in groups if not known.issuperset(group.keys)]


def _records(group: Group, found: Sequence[Evaluated]) -> list[Mapping[str, Any]]:
    return [_record(group, place, each) for place, each in enumerate(found)]


def _record(group: Group, place: int, found: Evaluated) -> Mapping[str, Any]:
    record: dict[str, Any] = {
        "key": group.keys[place],
        "method": group.method.title,
        "weights": list(group.mixes[place]),
        "scores": {task: dict(scores) for task, scores in found.scores.items()},
        "seconds": round(found.seconds, 6),
    }
    return record if found.error is None else {**record, "error": found.error}
