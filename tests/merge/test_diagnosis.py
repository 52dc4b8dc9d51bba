"""The diagnosis of a merge against numbers computed from its weights, and its picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from mergekit_bayes import merge
from mergekit_bayes.errors import CheckpointError, EvaluateError
from mergekit_bayes.evaluate.measured import compare_with
from mergekit_bayes.merge.diagnosis import place_of, read_diagnosis, short_labels
from mergekit_bayes.merge.heat_map import _axes, _grid, draw_heat_map
from tests.merge.builders import random_precisions, random_tensors, write_checkpoint, write_precisions

SHAPES = {
    "embed.weight": (5, 3),
    "layers.0.mlp.up.weight": (4, 3),
    "layers.0.norm.weight": (3,),
    "layers.1.mlp.up.weight": (4, 3),
}
UNITS = (20, 50)
PRIOR = 0.5


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    """A base and two sources whose precisions count some training units."""
    base = write_checkpoint(tmp_path / "base", random_tensors(0, SHAPES))
    models = []
    for seed, (name, units) in enumerate(zip(("code", "docs"), UNITS, strict=True), start=1):
        folder = write_checkpoint(tmp_path / "tuned" / name, random_tensors(seed, SHAPES))
        write_precisions(
            folder, random_precisions(seed, SHAPES, above=PRIOR), num_examples=units, prior_precision=PRIOR
        )
        models.append({"model": str(folder), "parameters": {"weight": 0.5}})
    return {"merge_method": "posterior", "base_model": str(base), "models": models}


@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_the_costs_are_those_of_the_weights(recipe: dict[str, Any], tmp_path: Path, scale: str) -> None:
    """The curvature of a source is what its precisions hold beyond their own prior, whatever that of the merge is."""
    prior = PRIOR if scale == "sum" else 0.01
    folder = merge({**recipe, "scale": scale, "precision": {"prior": prior}}, tmp_path / "out").folder
    found = read_diagnosis(folder)
    merged = load_file(folder / "model.safetensors")
    assert found.per_unit
    for cost, source, units in zip(found.costs, recipe["models"], UNITS, strict=True):
        assert (cost.label, round(cost.units or 0)) == (source["model"], units)
        mean = load_file(Path(source["model"]) / "model.safetensors")
        precision = load_file(Path(source["model"]) / "precision.safetensors")
        total = 0.0
        for name in SHAPES:
            beyond = precision[name].astype(float) - PRIOR
            expected = 0.5 * float((np.square(merged[name].astype(float) - mean[name]) * beyond).sum())
            assert cost.by_tensor[name] == pytest.approx(expected, rel=1e-4)
            total += expected
        assert cost.per_unit == pytest.approx(total / units, rel=1e-4)


def test_the_costliest_tensor_comes_first(recipe: dict[str, Any], tmp_path: Path) -> None:
    found = read_diagnosis(merge(recipe, tmp_path / "out").folder)
    totals = [conflict.total for conflict in found.conflicts]
    assert totals == sorted(totals, reverse=True)
    assert {conflict.tensor for conflict in found.conflicts} == set(SHAPES)
    assert sum(totals) == pytest.approx(sum(cost.per_unit or 0.0 for cost in found.costs))


@pytest.mark.parametrize(
    ("tensor", "place"),
    [
        ("model.layers.12.self_attn.q_proj.weight", (12, "self_attn.q_proj")),
        ("model.layers.3.mlp.up_proj", (3, "mlp.up_proj")),
        ("transformer.h.0.ln_1.bias", (0, "ln_1.bias")),
        ("0.weight", (None, "0")),
        ("0.linear.weight", (0, "linear")),
        ("encoder.block.2.layer.0.q.weight", (2, "block.layer.0.q")),
        ("model.embed_tokens.weight", (None, "model.embed_tokens")),
    ],
)
def test_places_of_tensors(tensor: str, place: tuple[int | None, str]) -> None:
    assert place_of(tensor) == place


def test_short_labels() -> None:
    assert short_labels(["a/b/code", "a/b/docs"]) == {"a/b/code": "code", "a/b/docs": "docs"}
    assert short_labels(["a/b", "a/b/c"]) == {"a/b": "a/b", "a/b/c": "c"}
    assert short_labels(["only/one"]) == {"only/one": "only/one"}
    assert short_labels(["x", "y/z"]) == {"x": "x", "y/z": "y/z"}


def test_the_picture_has_every_number_in_its_place(recipe: dict[str, Any], tmp_path: Path) -> None:
    found = read_diagnosis(merge(recipe, tmp_path / "out").folder)
    rows, columns = _axes(found)
    assert (rows, columns) == ([0, 1, None], ["mlp.up", "norm", "embed"])
    grid = np.array(_grid(found.costs[0], rows, columns, per_unit=False))
    by_tensor = found.costs[0].by_tensor
    assert grid[0, 0] == by_tensor["layers.0.mlp.up.weight"]
    assert grid[2, 2] == by_tensor["embed.weight"]
    assert np.isnan(grid).sum() == 5
    assert np.nansum(grid) == pytest.approx(found.costs[0].total)


def test_the_same_report_gives_the_same_picture(recipe: dict[str, Any], tmp_path: Path) -> None:
    found = read_diagnosis(merge(recipe, tmp_path / "out").folder)
    for name in ("a.png", "b.png"):
        draw_heat_map(tmp_path / name, found)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_merge_without_precisions_predicts_nothing(recipe: dict[str, Any], tmp_path: Path) -> None:
    folder = merge({**recipe, "merge_method": "linear"}, tmp_path / "out").folder
    with pytest.raises(CheckpointError, match="linear knew no precisions of its sources, so nothing is predicted"):
        read_diagnosis(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "other"}', '{"format": "mergekit_bayes.merge_report"}'])
def test_what_is_no_report(tmp_path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match="holds no report of a merge"):
        read_diagnosis(tmp_path)
    (tmp_path / "merge_report.json").write_text(text)
    with pytest.raises(CheckpointError, match="is no report of a merge"):
        read_diagnosis(tmp_path)


def results(folder: Path, losses: dict[str, dict[str, float]]) -> Path:
    """Results of an evaluation of models, by their folders."""
    from mergekit_bayes.merge.inputs import open_input

    models = {
        path: {"fingerprint": open_input(path, False, base_dir=Path()).fingerprint, "samples": 0, "prune": 0.0}
        for path in losses
    }
    scores = {path: {data: {"loss": {"value": value}} for data, value in own.items()} for path, own in losses.items()}
    content = {"format": "mergekit_bayes.evaluation", "models": models, "scores": scores}
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def test_predicted_beside_measured(recipe: dict[str, Any], tmp_path: Path) -> None:
    folder = merge(recipe, tmp_path / "out").folder
    code, docs = (source["model"] for source in recipe["models"])
    losses = {str(folder): {"code": 2.5, "prose": 3.0}, code: {"code": 2.0, "prose": 4.0}, docs: {"prose": 2.9}}
    evaluated = results(tmp_path / "scores", losses)
    found = read_diagnosis(folder)
    comparisons = compare_with(found, evaluated, {docs: "prose"})
    assert [(each.label, each.data) for each in comparisons] == [(code, "code"), (docs, "prose")]
    assert [each.measured for each in comparisons] == pytest.approx([0.5, 0.1])
    assert [each.predicted for each in comparisons] == [cost.per_unit for cost in found.costs]
    with pytest.raises(EvaluateError, match=r"which data set is of its task\? The results have code, prose; name it"):
        compare_with(found, evaluated)
    with pytest.raises(EvaluateError, match="strange: is no source of this merge"):
        compare_with(found, evaluated, {"strange": "code"})


def test_models_that_were_not_evaluated(recipe: dict[str, Any], tmp_path: Path) -> None:
    folder = merge(recipe, tmp_path / "out").folder
    found = read_diagnosis(folder)
    with pytest.raises(EvaluateError, match="holds no results of an evaluation"):
        compare_with(found, tmp_path)
    only_source = results(tmp_path / "source", {recipe["models"][0]["model"]: {"code": 1.0}})
    with pytest.raises(EvaluateError, match="expected the merge among its models"):
        compare_with(found, only_source)
    only_merge = results(tmp_path / "merge", {str(folder): {"code": 1.0}})
    with pytest.raises(EvaluateError, match="expected the sources among its models"):
        compare_with(found, only_merge)
