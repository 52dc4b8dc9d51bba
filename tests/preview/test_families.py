"""What merges of every family are predicted to cost, against dense float64 matrices made from the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergekit_bayes.errors import NonPositivePrecisionError, PlanError, RecipeError
from mergekit_bayes.preview.families import AS_MERGED, FamilyCosts, compare_families
from mergekit_bayes.preview.family_figure import draw_families, layers_of
from tests.merge.builders import read_precisions, read_tensors, write_checkpoint
from tests.merge.test_kronecker import NAMES, PRIOR, SHAPES, WEIGHTS, W, precision, recipe, write_models

NORM = "layers.0.norm.weight"
TOTALS = {"one": 100, "two": 40}


def truth(root: Path, weights: tuple[float, ...] = WEIGHTS) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The merged means of every family with all weights in one vector, and what they are judged by."""
    names = (NORM, W)
    models = {
        name: np.concatenate([read_tensors(root / name)[each].double().numpy().reshape(-1) for each in names])
        for name in ("base", *NAMES)
    }
    known = {}
    for name in NAMES:
        sidecar = read_precisions(root / name)
        whole = np.zeros((16, 16))
        whole[:4, :4] = np.diag(sidecar[NORM].double().numpy())
        whole[4:, 4:] = precision(sidecar, SHAPES[W], PRIOR)  # type: ignore[arg-type]
        known[name] = whole
    readings = {
        "isotropic": dict.fromkeys(NAMES, PRIOR * np.eye(16)),
        "diagonal": {name: np.diag(np.diag(each)) for name, each in known.items()},
        "kronecker": known,
    }
    means = {}
    for family, own in readings.items():
        start = PRIOR * np.eye(16)
        total = start + sum(w * (own[name] - start) for w, name in zip(weights, NAMES, strict=True))
        pull = sum(w * own[name] @ (models[name] - models["base"]) for w, name in zip(weights, NAMES, strict=True))
        means[family] = models["base"] + np.linalg.solve(total, pull)
    return means, {"models": models, "known": known}


def increase(mean: np.ndarray, name: str, judge: dict[str, Any]) -> float:
    gap = mean - judge["models"][name]
    return float(0.5 * gap @ (judge["known"][name] - PRIOR * np.eye(16)) @ gap)


@pytest.mark.parametrize("kinds", [("kfac", "kfac"), ("corrected", "gram"), ("kfac", "diagonal")])
def test_every_family_is_judged_by_the_richest_posteriors(kinds: tuple[str, str], tmp_path: Path) -> None:
    write_models(tmp_path, kinds)
    means, judge = truth(tmp_path)
    found = compare_families(recipe(tmp_path, method="posterior"))
    assert (found.judge, found.per_unit, found.method) == ("kronecker", True, "posterior")
    assert list(found.by_tensor) == ["isotropic", "diagonal", "kronecker", AS_MERGED]
    for family, mean in means.items():
        for name in NAMES:
            expected = increase(mean, name, judge) / TOTALS[name]
            assert found.cost(family, str(tmp_path / name)) == pytest.approx(expected, rel=1e-3), (family, name)
    assert found.total(AS_MERGED) == pytest.approx(found.total("kronecker"), rel=1e-6)
    before, after = found.total("isotropic"), found.total("diagonal")
    assert found.removed("diagonal") == pytest.approx(1 - after / before)


@pytest.mark.parametrize("kinds", [("kfac", "kfac"), ("gram", "kfac"), ("corrected", "diagonal")])
def test_the_rule_with_the_judge_s_own_posteriors_is_the_minimum(kinds: tuple[str, str], tmp_path: Path) -> None:
    """Of the weighted increases and the prior's terms, as the docstring has it."""
    write_models(tmp_path, kinds)
    means, judge = truth(tmp_path)

    def objective(mean: np.ndarray) -> float:
        rest = 1 - sum(WEIGHTS)
        found = rest * 0.5 * PRIOR * np.sum((mean - judge["models"]["base"]) ** 2)
        for weight, name in zip(WEIGHTS, NAMES, strict=True):
            near = 0.5 * PRIOR * np.sum((mean - judge["models"][name]) ** 2)
            found += weight * (increase(mean, name, judge) + near)
        return float(found)

    lowest = objective(means["kronecker"])
    assert lowest < objective(means["diagonal"])
    assert lowest < objective(means["isotropic"])
    generator = np.random.Generator(np.random.PCG64(0))
    assert all(lowest <= objective(means["kronecker"] + 0.01 * generator.normal(size=16)) for _ in range(20))


def test_without_factors_the_diagonals_judge(tmp_path: Path) -> None:
    write_models(tmp_path, ("diagonal", "diagonal"))
    means, judge = truth(tmp_path)
    found = compare_families(recipe(tmp_path, method="task_arithmetic", scale="sum"))
    assert found.judge == "diagonal"
    assert list(found.by_tensor) == ["isotropic", "diagonal", AS_MERGED]
    for name in NAMES:
        label = str(tmp_path / name)
        assert found.cost("diagonal", label) * TOTALS[name] == pytest.approx(
            increase(means["diagonal"], name, judge), rel=1e-5
        )
        assert found.cost(AS_MERGED, label) == pytest.approx(found.cost("isotropic", label), rel=1e-6)
    assert set(found.by_tensor["diagonal"][str(tmp_path / "one")]) == set(SHAPES)


def test_methods_that_see_whole_tensors_and_do_not_use_precisions(tmp_path: Path) -> None:
    write_models(tmp_path, ("kfac", "kfac"), transposed=True)
    found = compare_families(recipe(tmp_path, method="iso_c"))
    assert found.total("kronecker") < found.total(AS_MERGED)


def test_per_unit_precisions_give_per_unit_costs(tmp_path: Path) -> None:
    write_models(tmp_path, ("diagonal", "diagonal"))
    found = compare_families(recipe(tmp_path, method="posterior", scale="mean", precision={"prior": 1e-9}))
    assert found.per_unit
    isotropic = compare_families(recipe(tmp_path, method="posterior", scale="sum")).by_tensor["isotropic"]
    for name in NAMES:  # the isotropic merge is the same, and so is what it costs
        label = str(tmp_path / name)
        assert found.cost("isotropic", label) == pytest.approx(sum(isotropic[label].values()), rel=1e-4)


def test_bad_input(tmp_path: Path) -> None:
    write_models(tmp_path, ("diagonal", "diagonal"))
    two_of_one = recipe(tmp_path, method="mixture")
    for source in two_of_one["models"]:
        source["task"] = "same"
    with pytest.raises(RecipeError, match="several are of the task same, one mixture"):
        compare_families(two_of_one)
    with pytest.raises(NonPositivePrecisionError, match="the diagonal merge has a precision of -"):
        compare_families(recipe(tmp_path, (-3.0, 0.1), method="task_arithmetic"))
    for name in NAMES:
        (tmp_path / name / "precision.safetensors").unlink()
    bare = recipe(tmp_path, method="task_arithmetic", precision={"prior": 1.0})
    with pytest.raises(PlanError, match="no source has a precision"):
        compare_families(bare)
    write_checkpoint(tmp_path / "other", {"x": read_tensors(tmp_path / "base")[NORM]})
    with pytest.raises(PlanError):
        compare_families({**bare, "base_model": str(tmp_path / "other")})


def test_the_picture(tmp_path: Path) -> None:
    costs = FamilyCosts(
        "posterior",
        "diagonal",
        True,
        {
            row: {"a/code": {"layers.0.w": scale, "embed": 2 * scale}, "a/docs": {"layers.0.w": scale}}
            for row, scale in (("isotropic", 2.0), ("diagonal", 1.0), (AS_MERGED, 1.5))
        },
    )
    assert layers_of(costs) == {
        "0": {"isotropic": 4.0, "diagonal": 2.0, AS_MERGED: 3.0},
        "outside": {"isotropic": 4.0, "diagonal": 2.0, AS_MERGED: 3.0},
    }
    for name in ("a.png", "b.png"):
        draw_families(tmp_path / name, costs)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
