"""Scores fitted to evaluated mixes, and previews held against real runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes.merge.schemas import method_schemas
from mergekit_bayes.preview.design import lattice
from mergekit_bayes.preview.fitted import fit_scores
from mergekit_bayes.preview.references import against_references, reference_runs
from mergekit_bayes.preview.results import Point, Scale
from mergekit_bayes.preview.run import preview
from mergekit_bayes.recipe import load_recipe
from mergekit_bayes.recipe.preview import PreviewRecipe
from tests.preview.conftest import TABLES, Recipes

MIXES = lattice(2, 4)


def bowls(mix: tuple[float, ...]) -> np.ndarray:
    return np.array([1 + (mix[0] - 1) ** 2, 2 + 3 * (mix[1] - 1) ** 2])


def test_quadratic_scores_are_found_from_a_part_of_the_design() -> None:
    known = {mix: bowls(mix) for mix in MIXES if mix != (0.75, 0.25)}
    fitted = fit_scores(MIXES, known)
    assert fitted is not None
    assert np.allclose(fitted.scores, [bowls(mix) for mix in MIXES])
    assert fitted.fitted_to == 4
    assert np.allclose(fitted.error, 0, atol=1e-9)


def test_too_few_and_broken_scores_fit_nothing() -> None:
    assert fit_scores(MIXES, {}) is None
    known = {MIXES[0]: bowls(MIXES[0]), MIXES[1]: bowls(MIXES[1]), MIXES[2]: np.array([np.nan, 1.0])}
    assert fit_scores(MIXES, known) is None


def test_a_preview_with_a_fitted_tier(recipe: Recipes, tmp_path: Path) -> None:
    content = recipe(fidelity=["evaluated", "fitted"], budget={"points": 4}, design={"partitions": 8})
    front = preview(content, tmp_path / "out", tables=TABLES).front
    assert front["tiers"]["evaluated"]["points"] == 4
    assert front["tiers"]["fitted"]["points"] == 9
    assert front["fitted"]["task_arithmetic"]["fitted_to"] == 4
    for point in front["points"]:
        if "evaluated" in point:  # a gentle function of the weights, so that a quadratic is near it
            assert point["fitted"]["scores"] == pytest.approx(point["evaluated"]["scores"], abs=0.05)


def reference_report(recipe: Recipes, scores: list[list[float]]) -> dict[str, object]:
    references = [
        {"name": f"run {place}", "weights": list(mix), "scores": dict(zip(("t1", "t3"), row, strict=True))}
        for place, (mix, row) in enumerate(zip(MIXES, scores, strict=False))
    ]
    content = recipe(references=references)
    loaded = load_recipe(content, expect=PreviewRecipe, methods=method_schemas())
    scale = Scale(np.array([2.0, 5.0]), np.array([1.0, 2.0]), (False, False))
    points = [
        Point("m", mix, scores={"evaluated": bowls(mix)}, gains={"evaluated": scale.gains(bowls(mix))}) for mix in MIXES
    ]
    runs = reference_runs(loaded, [], {})
    found = against_references(runs, points, recipe=loaded, scale=scale, tiers=["evaluated"])
    report: dict[str, object] = found["tiers"]["evaluated"]["m"]
    return report


def test_a_preview_that_is_right_has_no_error_and_no_regret(recipe: Recipes) -> None:
    report = reference_report(recipe, [bowls(mix).tolist() for mix in MIXES])
    assert report["previewed"] == 5
    assert report["igd_plus"] == pytest.approx(0)
    assert report["spearman"] == pytest.approx({"t1": 1.0, "t3": 1.0})
    assert report["regret"] == pytest.approx({"max_min": 0.0, "mean": 0.0})
    assert all(error["t1"] == pytest.approx(0) for error in report["errors"])  # type: ignore[attr-defined]


def test_a_preview_that_is_upside_down_has_regret(recipe: Recipes) -> None:
    turned = [bowls(mix[::-1]).tolist() for mix in MIXES]
    report = reference_report(recipe, turned)
    assert report["spearman"] == pytest.approx({"t1": -1.0, "t3": -1.0})
    real = np.array([[2.0 - row[0], (5.0 - row[1]) / 3] for row in turned])
    ours = np.array([[2.0 - bowls(mix)[0], (5.0 - bowls(mix)[1]) / 3] for mix in MIXES])
    expected = real.min(axis=1).max() - real.min(axis=1)[ours.min(axis=1).argmax()]
    assert report["regret"]["max_min"] == pytest.approx(expected)  # type: ignore[index]
