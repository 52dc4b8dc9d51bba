"""Real runs beside a preview: models score what they score alone, and are compared with mixes of their weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mergekit_bayes import merge
from mergekit_bayes.errors import PlanError
from mergekit_bayes.merge.schemas import method_schemas
from mergekit_bayes.preview.describe import describe
from mergekit_bayes.preview.run import preview
from mergekit_bayes.recipe import load_recipe
from mergekit_bayes.recipe.preview import PreviewRecipe
from tests.preview.conftest import TABLES, Recipes
from tests.preview.test_run import losses


@pytest.fixture
def trained(recipe: Recipes, tmp_path: Path) -> dict[str, Path]:
    """An adapter and a full model that stand for runs on both tasks: merges, so that a preview of them is right."""
    content = recipe(methods=["task_arithmetic", {"merge_method": "linear", "space": "full"}])
    loaded = load_recipe(content, expect=PreviewRecipe, methods=method_schemas())
    found = {"adapter": tmp_path / "adapter", "full": tmp_path / "full"}
    for folder, method, mix in zip(found.values(), loaded.compared, [(0.25, 0.75), (0.5, 0.5)], strict=True):
        merge(loaded.merge_of(method, mix), folder)
    return found


def references(trained: dict[str, Path]) -> list[dict[str, object]]:
    return [
        {"name": "adapter", "weights": [0.25, 0.75], "model": str(trained["adapter"])},
        {"name": "full", "weights": [0.5, 0.5], "model": str(trained["full"])},
        {"name": "elsewhere", "weights": [1.0, 0.0], "scores": {"t1": 3.0, "t3": 3.0}, "minutes": 2.0},
    ]


def test_models_of_real_runs_are_scored_and_compared(
    recipe: Recipes, llama: Path, trained: dict[str, Path], tmp_path: Path
) -> None:
    (trained["adapter"] / "finetune_report.json").write_text(json.dumps({"seconds": {"training": 240.0}}))
    content = recipe(references=references(trained), fidelity="evaluated", budget={"minutes": 1e-9})
    assert "and 2 references" in describe(load_recipe(content, expect=PreviewRecipe, methods=method_schemas()))
    skipped = preview(content, tmp_path / "out", tables=TABLES).front
    assert skipped["skipped"] == 3  # all but the experts, which are looked at whatever it takes
    for run, alone in zip(
        skipped["references"]["runs"][:2],
        [losses(trained["adapter"], llama, adapter=True), losses(trained["full"], llama, adapter=False)],
        strict=True,
    ):
        assert np.allclose(list(run["scores"].values()), alone[:2], atol=1e-5), run["name"]
        assert run["model"] == str(trained[run["name"]])
    front = preview({**content, "budget": {}}, tmp_path / "out", tables=TABLES).front
    assert front["references"]["runs"] == skipped["references"]["runs"]
    report = front["references"]["tiers"]["evaluated"]["task_arithmetic"]
    assert report["previewed"] == 3
    assert [error["name"] for error in report["errors"]] == ["adapter", "full", "elsewhere"]
    # in scores: what random adapters gain is about a rounding error of the loss, and errors are in units of that
    at = {tuple(point["weights"]): point for point in front["points"] if point["method"] == "task_arithmetic"}
    for run in front["references"]["runs"][:2]:
        assert at[tuple(run["weights"])]["evaluated"]["scores"] == pytest.approx(run["scores"], abs=1e-5)
    assert front["costs"]["one_run_on_all_tasks"] == pytest.approx((240 + 120) / 2)


def test_a_reference_that_fails_is_said_and_left_out(
    recipe: Recipes, trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_bayes.preview.evaluators import Evaluations

    found = Evaluations._found

    def failing(self: Evaluations, method: object, mixes: object, share: object) -> object:
        if getattr(method, "title", "") == "references[1]":
            raise ValueError("out of luck")
        return found(self, method, mixes, share)  # type: ignore[arg-type]

    monkeypatch.setattr(Evaluations, "_found", failing)
    content = recipe(references=references(trained)[:2], fidelity="evaluated", design=[[0.25, 0.75], [0.5, 0.5]])
    front = preview(content, tmp_path / "out", tables=TABLES).front
    assert front["references"]["runs"][1]["error"] == "ValueError: out of luck"
    assert front["references"]["tiers"]["evaluated"]["task_arithmetic"]["previewed"] == 1
    assert "reference full could not be evaluated: ValueError: out of luck" in front["notes"]
    assert front["skipped"] == 0


def test_a_reference_that_is_not_there_is_refused_before_anything_is_written(recipe: Recipes, tmp_path: Path) -> None:
    content = recipe(references=[{"name": "run", "model": str(tmp_path / "nowhere")}])
    with pytest.raises(PlanError, match="nowhere"):
        preview(content, tmp_path / "out", tables=TABLES)
    assert not (tmp_path / "out").exists()
