"""Who evaluates what: groups are dealt out, and what is left over is shared where rows can be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mergekit_bayes.merge.processes import Processes
from mergekit_bayes.preview.cache import EvaluationCache
from mergekit_bayes.preview.evaluators import Evaluated
from mergekit_bayes.preview.sweep import Group, groups_of, run_groups

METHOD: Any = SimpleNamespace(title="rule", plan=SimpleNamespace(job="job"))


class Alike(Processes):
    """Two processes of which the other one does, and has, the same."""

    def gathered(self, value: Any) -> list[Any]:
        return [value] * self.count


class Recorder:
    """Remembers what it was asked for, and by how many processes."""

    def __init__(self, *, splits_rows: bool) -> None:
        self.splits_rows = splits_rows
        self.asked: list[tuple[float, int]] = []

    def evaluate(self, method: object, mixes: Sequence[Any], processes: Processes | None = None) -> list[Evaluated]:
        self.asked += [(mix[0], 1 if processes is None else processes.count) for mix in mixes]
        return [Evaluated({"t": {"loss": mix[0]}}, 0.0) for mix in mixes]


def groups(count: int, **options: Any) -> list[Group]:
    return groups_of(METHOD, [(float(index),) for index in range(count)], together=1, inputs=[], **options)


@pytest.mark.parametrize(
    ("rank", "splits_rows", "asked"),
    [
        (0, True, [(0.0, 1), (2.0, 1), (4.0, 2)]),
        (1, True, [(1.0, 1), (3.0, 1), (4.0, 2)]),
        (0, False, [(0.0, 1), (2.0, 1), (4.0, 1)]),
        (1, False, [(1.0, 1), (3.0, 1)]),
    ],
)
def test_shares(rank: int, splits_rows: bool, asked: list[tuple[float, int]], tmp_path: Path) -> None:
    recorder: Any = Recorder(splits_rows=splits_rows)
    run_groups(groups(5), recorder, EvaluationCache(tmp_path, rank=rank), processes=Alike(rank, 2))
    assert recorder.asked == asked
    kept = {record["weights"][0] for record in EvaluationCache(tmp_path).read().values()}
    assert kept == {mix for mix, together in asked if together == 1 or rank == 0}  # the leader keeps what is shared


def test_what_is_known_is_not_dealt(tmp_path: Path) -> None:
    cache = EvaluationCache(tmp_path)
    run_groups(groups(3), Recorder(splits_rows=True), cache)  # type: ignore[arg-type]
    recorder: Any = Recorder(splits_rows=True)
    told: list[int] = []
    run_groups(groups(5), recorder, cache, processes=Alike(0, 2), report=told.append)
    assert recorder.asked == [(3.0, 1)]
    assert told == [3, 2]


def test_mixes_that_others_evaluate_are_in_groups_of_their_own() -> None:
    (known, *_) = (group.keys[0] for group in groups(1))
    mixes = [(float(index),) for index in range(5)]
    found = groups_of(METHOD, mixes, together=3, inputs=[], elsewhere={known})
    assert [group.mixes for group in found] == [((0.0,),), ((1.0,), (2.0,), (3.0,)), ((4.0,),)]
