"""Previews of models that are spread over devices: here over memory and disk, as one CPU allows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mergekit_bayes.errors import RecipeError
from mergekit_bayes.preview.run import preview
from mergekit_bayes.preview.stacked import _device_of
from tests.preview.conftest import TABLES, Recipes

PARTS = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu", "model.norm": "cpu"}
PARTS |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}


def spread(recipe: Recipes, device_map: object = PARTS, **changes: Any) -> dict[str, Any]:
    content = recipe(fidelity="evaluated", **changes)
    return {**content, "evaluation": {**content["evaluation"], "device_map": device_map}}


def scores(content: dict[str, Any], out: Path) -> list[dict[str, Any]]:
    return [
        {"weights": point["weights"], "error": point.get("error"), **point.get("evaluated", {}).get("scores", {})}
        for point in preview(content, out, tables=TABLES).front["points"]
    ]


def test_mixes_beside_offloaded_layers_have_the_scores_of_one_device(recipe: Recipes, tmp_path: Path) -> None:
    whole = scores(recipe(fidelity="evaluated"), tmp_path / "whole")
    assert scores(spread(recipe), tmp_path / "spread") == whole
    assert all({"t1", "t3"} < each.keys() and each["error"] is None for each in whole)


def test_merges_in_memory_need_every_weight_there(recipe: Recipes, tmp_path: Path) -> None:
    found = scores(spread(recipe, methods=["posterior"]), tmp_path / "out")
    assert all("is offloaded, and a merge in memory needs every weight there" in str(each) for each in found)
    kept = dict.fromkeys(PARTS, "cpu")
    whole = scores(recipe(fidelity="evaluated", methods=["posterior"]), tmp_path / "whole")
    assert scores(spread(recipe, kept, methods=["posterior"]), tmp_path / "kept") == whole


def test_factors_go_where_their_layer_computes() -> None:
    from accelerate.hooks import AlignDevicesHook

    assert _device_of(nn.Linear(2, 2)) == torch.device("cpu")
    assert _device_of(nn.Linear(2, 2, device="meta")) == torch.device("cpu")
    offloaded = nn.Linear(2, 2, device="meta")
    offloaded._hf_hook = AlignDevicesHook(execution_device="cuda:1")
    assert _device_of(offloaded) == torch.device("cuda:1")


def test_one_process_has_all_devices(recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="spreads a model over the devices of one process, and there are 2"):
        preview(spread(recipe, "auto"), tmp_path / "out", tables=TABLES)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"device_map": "everywhere"}, "expected `auto`, `balanced`, `balanced_low_0` or `sequential`"),
        ({"device_map": "auto", "device": "cuda"}, "one device beside `device_map`; keep one of them"),
        ({"device_map": {"model": ["cpu"]}}, "expected text"),
    ],
)
def test_bad_maps_are_refused(recipe: Recipes, tmp_path: Path, evaluation: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        preview(recipe(evaluation=evaluation), tmp_path / "out", tables=TABLES)
