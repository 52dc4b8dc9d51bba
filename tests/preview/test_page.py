"""The interactive page: what it holds is what front.json says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergekit_bayes.errors import RecipeError
from mergekit_bayes.merge.schemas import method_schemas
from mergekit_bayes.preview import page
from mergekit_bayes.preview.describe import describe
from mergekit_bayes.preview.run import preview
from mergekit_bayes.recipe import load_recipe
from mergekit_bayes.recipe.preview import PreviewRecipe
from tests.preview.conftest import Recipes


def front(tasks: int, tier: str = "evaluated") -> dict[str, Any]:
    """Three points of a preview, one of them dominated and one with a score that is no number."""
    names = [f"task <{place}>" for place in range(tasks)]
    gains: list[list[float | None]] = [[0.5] * tasks, [0.2] * tasks, [0.1, None, *[0.3] * (tasks - 2)]]
    points = [
        {
            "method": "rule",
            "weights": [1.0] * tasks,
            tier: {"scores": dict(zip(names, row, strict=True)), "normalised": dict(zip(names, row, strict=True))},
        }
        for row in gains
    ]
    for point, dominated in zip(points, (False, True, True), strict=True):
        point[tier]["dominated"] = dominated  # type: ignore[index,call-overload]
    zero, one = dict.fromkeys(names, 2.0), dict.fromkeys(names, 1.0)
    return {
        "tasks": [
            {"name": name, "expert": f"m{i}", "metric": "loss", "better": "lower"} for i, name in enumerate(names)
        ],
        "models": [f"tuned/m{place}" for place in range(tasks)],
        "methods": ["rule"],
        "base": zero,
        "experts": {f"m{place}": one for place in range(tasks)},
        "references": {"runs": [{"name": "run", "scores": dict.fromkeys(names, 1.25)}]},
        "tiers": {tier: {"points": 3}},
        "points": points,
    }


def traces(text: str) -> list[dict[str, Any]]:
    """The data that a page hands to plotly."""
    start = text.index("[", text.index("Plotly.newPlot("))
    found: list[dict[str, Any]] = json.JSONDecoder().raw_decode(text[start:])[0]
    return found


@pytest.mark.parametrize(("tasks", "kind"), [(2, "scatter"), (3, "scatter3d")])
def test_points_lie_where_front_json_has_them(tasks: int, kind: str, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    page.write_page(front(tasks), tmp_path / "front.html")
    found = {trace["name"]: trace for trace in traces((tmp_path / "front.html").read_text())}
    assert list(found) == ["rule", "rule, dominated", "base", "experts", "reference runs"]
    assert {trace["type"] for trace in found.values()} == {kind}
    last = "xyz"[tasks - 1]
    assert (found["rule"]["x"], found["rule"][last]) == ([0.5], [0.5])
    assert (found["rule, dominated"]["x"], found["rule, dominated"]["y"]) == ([0.2, 0.1], [0.2, None])
    assert found["experts"][last] == [1.0] * tasks
    assert found["reference runs"]["x"] == [0.75]
    assert found["rule"]["text"][0].startswith("<b>rule</b><br>m0: 1<br>")
    assert "task &lt;0&gt;, loss: 0.5" in found["rule"]["text"][0]
    assert "no number" in found["rule, dominated"]["text"][1]


def test_more_tasks_are_a_line_for_every_point(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    page.write_page(front(4, "surrogate"), tmp_path / "front.html")
    rule, others, base = traces((tmp_path / "front.html").read_text())
    assert rule["y"] == [0.5] * 4 + [None]
    assert others["y"] == [0.2] * 4 + [None, 0.1, None, 0.3, 0.3, None]
    assert len(others["x"]) == len(others["text"]) == 10
    assert base["y"] == [0.0] * 4 + [None]


def test_a_page_is_written_beside_the_figures_and_always_the_same(recipe: Recipes, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    content = recipe(fidelity="surrogate", output={"html": True})
    texts = []
    for name in ("one", "two"):
        result = preview(content, tmp_path / name)
        texts.append((tmp_path / name / "front.html").read_text())
        assert "front.html" in result.summary()
    assert texts[0] == texts[1]
    assert sum(len(trace["x"]) for trace in traces(texts[0])) == 5 + 1


def test_a_page_without_plotly_is_refused_before_anything_is_done(
    recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "find_spec", lambda name: None)
    content = recipe(fidelity="surrogate", output={"html": True})
    message = r"output\.html: needs plotly, not installed here; pip install 'mergekit-bayes\[preview-html\]'"
    with pytest.raises(RecipeError, match=message):
        preview(content, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RecipeError, match=message):
        describe(load_recipe(content, expect=PreviewRecipe, methods=method_schemas()))
    without = {**content, "output": {"html": False}}
    assert "design: 5 mixes" in describe(load_recipe(without, expect=PreviewRecipe, methods=method_schemas()))
