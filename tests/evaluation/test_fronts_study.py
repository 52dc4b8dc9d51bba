"""The study of fronts trains, merges and scores, and its page shows its results."""

from __future__ import annotations

import json
import random
from itertools import islice
from pathlib import Path

import pytest

from evaluation.fronts import study, summary
from evaluation.fronts.design import CENTROIDS, GROUPS, Group, label, rules
from evaluation.fronts.report import tables
from evaluation.fronts.train import train_runs, turns
from evaluation.merging.experts import Place
from evaluation.merging.language import Language, Texts
from evaluation.merging.train import Schedule, train
from tests.conftest import TinyCheckpoints
from tests.model.builders import with_tokenizer

PAGE = Path(study.__file__).parent
QUICK = Schedule(steps=2, rate=0.01)


def words(stream: random.Random, count: int) -> str:
    return " ".join(f"w{stream.randrange(45)}" for _ in range(count))


def test_turns_follow_the_shares() -> None:
    assert list(islice(turns((0.5, 0.5)), 4)) == [0, 1, 0, 1]
    taken = list(islice(turns((0.5, 0.25, 0.25)), 120))
    assert [taken.count(index) for index in range(3)] == [60, 30, 30]


def test_fronts_are_measured_above_the_base_and_against_training() -> None:
    def scores(first: float, second: float) -> dict[str, float]:
        return {"x": first, "y": 10 * second}

    experts = {"x": scores(2, -5), "y": scores(-5, 2)}  # gains of 1 and 10 over the base
    seed = {
        "anchors": {"base": scores(1, 1)},
        "experts": experts,
        "poor": {"50-50": scores(1.5, 1.5)},
        "real training": {"50-50": scores(1.9, 1.8)},
    }
    found = summary.summary(("x", "y"), {"50-50": (0.5, 0.5)}, [seed, seed])
    poor, real = (found["rows"][name] for name in ("poor", "real training"))
    assert [poor["hypervolume"]["mean"], real["hypervolume"]["mean"]] == [0.25, 0.72]
    assert poor["igd_plus"]["mean"] == pytest.approx(0.5)  # the distance of (0.5, 0.5) from (0.9, 0.8)
    assert poor["error"]["mean"] == pytest.approx(-0.35)
    assert real["igd_plus"]["mean"] == real["absolute_error"]["mean"] == 0
    assert found["points"]["poor"][0] == {"50-50": [0.5, 0.5]}
    assert [step["mean"] for step in found["steps"]] == []


def test_three_tasks_have_a_volume_and_picks_with_their_regret() -> None:
    """Boxes above the base, by hand: 0.5 x 0.5 x 0.5, and two that share 0.6 x 0.4 x 0.4, beside the three experts."""
    tasks, weights = ("x", "y", "z"), dict(zip(("33-33-33", "67-17-17"), CENTROIDS[:2], strict=True))

    def row(*points: tuple[float, float, float]) -> dict[str, dict[str, float]]:
        return {name: dict(zip(tasks, point, strict=True)) for name, point in zip(weights, points, strict=True)}

    seed = {
        "anchors": {"base": dict.fromkeys(tasks, 0.0)},
        "experts": {task: {each: 1.0 if each == task else -2.0 for each in tasks} for task in tasks},
        "poor": row((-0.5, 0.2, 0.2), (0.5, 0.5, 0.5)),
        "real training": row((0.6, 0.8, 0.8), (0.9, 0.4, 0.4)),
    }
    found = summary.summary(tasks, weights, [seed, seed])
    poor, real = (found["rows"][name] for name in ("poor", "real training"))
    assert poor["hypervolume"]["mean"] == pytest.approx(0.5**3)
    assert real["hypervolume"]["mean"] == pytest.approx(0.6 * 0.8 * 0.8 + 0.9 * 0.4 * 0.4 - 0.6 * 0.4 * 0.4)
    # (0.5, 0.5, 0.5) is short of (0.6, 0.8, 0.8) by (0.1, 0.3, 0.3) and of (0.9, 0.4, 0.4) by 0.4 in one task
    assert poor["igd_plus"]["mean"] == pytest.approx((0.19**0.5 + 0.4) / 2, abs=1e-4)
    assert found["picks"]["poor"]["weights"] == ["67-17-17"] * 2
    regret = {name: each["regret"]["mean"] for name, each in found["picks"].items()}
    assert regret == pytest.approx({"poor": 0.2, "real training": 0.0, "equal weights": 0.0})


def test_weights_are_shares_that_name_their_runs_apart() -> None:
    for group in GROUPS:
        assert [sum(weights) for weights in group.weights] == pytest.approx([1] * len(group.weights))
        assert all(len(weights) == len(group.tasks) and min(weights) >= 0 > -max(weights) for weights in group.weights)
        assert len({label(weights) for weights in group.weights}) == len(group.weights)


@pytest.mark.slow
def test_the_study_runs_from_training_to_tables(tiny_checkpoint: TinyCheckpoints, tmp_path: Path) -> None:
    stream = random.Random(0)
    texts = {task: Texts(*(words(stream, count) for count in (200, 40, 60))) for task in ("first", "second", "other")}
    folder = with_tokenizer(tiny_checkpoint("llama_tied"), tmp_path / "base", pad=True)
    family = Language(texts, folder=folder, window=8, rows=2)
    group = Group(("first", "second"), ((0.75, 0.25), (0.5, 0.5)))
    triple = Group(family.tasks, (CENTROIDS[0], CENTROIDS[4]))
    for seed in (0, 1):
        for task in family.tasks:
            where = Place(tmp_path, family.name, "lora", seed).folder(task)
            train(family, "lora", task, seed=seed, schedule=QUICK, folder=where)
        for each in (group, triple):
            train_runs(family, tmp_path, each, seed, QUICK)
    chosen = {name: {"chosen": 0.1} for name in ("linear", "hessian_weighted", "gram", "kronecker")}
    results, again = (study.study(family, tmp_path, [group, triple], (0, 1), rules(chosen)) for _ in range(2))
    study.write(tmp_path / "out", results)
    assert results == again | {"machine": results["machine"]}
    found = results["groups"]["first+second"]
    assert list(found["rows"]) == ["linear", "hessian_weighted", "gram", "kronecker", "real training"]
    assert all(abs(found["experts"][0][task][task]) == 1 for task in (0, 1))  # two steps may also make it worse
    third = results["groups"]["first+second+other"]
    assert [len(point) for seed in third["points"]["kronecker"] for point in seed.values()] == [3] * 4
    assert all((tmp_path / "out" / name).stat().st_size > 10_000 for name in ("fronts.png", "triple.png"))
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text()


def test_the_page_shows_the_committed_results() -> None:
    results = json.loads((PAGE / "results.json").read_text())
    page = (PAGE / "README.md").read_text()
    assert [table for table in tables(results).split("\n\n") if table not in page] == []
