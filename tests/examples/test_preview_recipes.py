"""The recipes in `recipes/preview`: they name their command, can be planned, and predict what the example shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_bayes.merge.schemas import method_schemas
from mergekit_bayes.preview.describe import describe
from mergekit_bayes.preview.run import preview
from mergekit_bayes.recipe import load_recipe
from mergekit_bayes.recipe.preview import PreviewRecipe

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "preview").rglob("*.yaml"))


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_its_command_and_can_be_planned(path: Path) -> None:
    assert f"bayes-merge {path.relative_to(ROOT)} OUT" in path.read_text()
    recipe = load_recipe(path, expect=PreviewRecipe, methods=method_schemas())
    assert "45 mixes of 2 methods, 90 in all" in describe(recipe)


def test_a_thousand_mixes_of_the_example_are_predicted_within_a_thousandth(tmp_path: Path) -> None:
    recipe = load_recipe(
        RECIPES[0],
        expect=PreviewRecipe,
        methods=method_schemas(),
        overrides=["fidelity=surrogate", "design.step=0.025", "methods=posterior"],
    )
    front = preview(recipe, tmp_path / "out").front
    assert len(front["points"]) == 861
    assert front["surrogate"]["methods"]["posterior"]["form"] == "rule"
    assert 0 < front["surrogate"]["methods"]["posterior"]["largest_error"] < 1e-3
    best = front["points"][front["tiers"]["surrogate"]["max_min"]]
    assert min(best["surrogate"]["normalised"].values()) > 0.2
    corners = {tuple(point["weights"]): point for point in front["points"]}
    for index, task in enumerate(front["tasks"]):
        corner = tuple(float(index == place) for place in range(3))
        assert corners[corner]["surrogate"]["normalised"][task["name"]] == pytest.approx(1.0, abs=1e-4)
