"""config.json of a merged checkpoint: the donor's, with what the merge changed, and a note where inputs differ."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_bayes.merge.run import MergeResult, merge
from tests.merge.builders import CONFIG, random_tensors, read_json, write_checkpoint

SHAPES = {"a.weight": (3, 2)}
NAMES = ("base", "one", "two")


def write(root: Path, configs: Mapping[str, Mapping[str, Any]], *, dtype: torch.dtype = torch.float32) -> None:
    for seed, name in enumerate(NAMES):
        write_checkpoint(root / name, random_tensors(seed, SHAPES, dtype=dtype), config=configs.get(name, CONFIG))


def run(root: Path, method: str = "task_arithmetic", **extra: Any) -> tuple[dict[str, Any], MergeResult]:
    models = [{"model": str(root / name), "parameters": {"weight": 0.5}} for name in ("one", "two")]
    recipe = {"merge_method": method, "base_model": str(root / "base"), "models": models, **extra}
    if method == "linear":
        del recipe["base_model"]
    result = merge(recipe, root / "out")
    return read_json(root / "out" / "config.json"), result


def notes(result: MergeResult) -> list[str]:
    return [note for note in result.report["tensors"]["notes"] if note.startswith("config.json")]


@pytest.mark.parametrize(("method", "donor"), [("task_arithmetic", "base"), ("linear", "one")])
def test_the_donor_is_the_base_or_else_the_first_source(method: str, donor: str, tmp_path: Path) -> None:
    write(tmp_path, {name: {**CONFIG, "layers": number} for number, name in enumerate(NAMES)})
    config, result = run(tmp_path, method)
    assert config["layers"] == NAMES.index(donor)
    others = [name for name in ("one", "two") if name != donor]
    assert notes(result) == [
        f"config.json: layers is {NAMES.index(donor)} in {tmp_path}/{donor}, {NAMES.index(name)} in {tmp_path}/{name}; "
        f"the output has that of {tmp_path}/{donor}"
        for name in others
    ]


def test_equal_configurations_are_copied_without_a_word(tmp_path: Path) -> None:
    write(tmp_path, {})
    config, result = run(tmp_path)
    assert config == CONFIG
    assert notes(result) == []


@pytest.mark.parametrize("key", ["_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"])
def test_differences_that_mean_nothing_are_not_mentioned(key: str, tmp_path: Path) -> None:
    write(tmp_path, {"two": {**CONFIG, key: "something else"}})
    _, result = run(tmp_path)
    assert notes(result) == []


def test_a_key_that_only_one_input_has_is_mentioned(tmp_path: Path) -> None:
    write(tmp_path, {"two": {**CONFIG, "sliding_window": 4096}})
    config, result = run(tmp_path)
    assert "sliding_window" not in config
    assert notes(result) == [
        f"config.json: sliding_window is None in {tmp_path}/base, 4096 in {tmp_path}/two; "
        f"the output has that of {tmp_path}/base"
    ]


def test_the_path_of_the_donor_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, {"base": {**CONFIG, "_name_or_path": "/home/someone/models/base"}})
    config, _ = run(tmp_path)
    assert "_name_or_path" not in config


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("asked", [{"dtype": "bfloat16"}, {"out_dtype": "bfloat16", "dtype": "float32"}])
def test_the_dtype_is_the_one_written(key: str, asked: dict[str, str], tmp_path: Path) -> None:
    nested = {**CONFIG, key: "float32", "text_config": {key: "float32"}, "vision_config": {"depth": 2}}
    write(tmp_path, dict.fromkeys(NAMES, nested))
    config, result = run(tmp_path, **asked)
    assert notes(result) == []
    assert config == {
        **CONFIG,
        key: "bfloat16",
        "text_config": {key: "bfloat16"},
        "vision_config": {"depth": 2},
    }


def test_the_dtype_stays_that_of_the_donor_where_none_is_asked_for(tmp_path: Path) -> None:
    write(tmp_path, {"base": {**CONFIG, "dtype": "bfloat16"}}, dtype=torch.bfloat16)
    config, _ = run(tmp_path)
    assert config["dtype"] == "bfloat16"


def test_inputs_are_never_changed(tmp_path: Path) -> None:
    nested = {**CONFIG, "text_config": {"dtype": "float32"}}
    write(tmp_path, {"base": nested})
    run(tmp_path, dtype="float16")
    assert read_json(tmp_path / "base" / "config.json") == nested
