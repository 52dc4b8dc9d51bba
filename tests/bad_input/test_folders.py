"""Model folders that contradict themselves, lead elsewhere, or are no model folders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.bad_input.conftest import Refused
from tests.bad_input.site import Site
from tests.merge.builders import read_json, write_checkpoint

INDEX = "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def shard(site: Site) -> Path:
    """Write `one` in two shards; returns its folder."""
    folder = site.root / "one"
    (folder / "model.safetensors").unlink()
    return write_checkpoint(folder, site.tensors("one"), shards=2)


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = read_json(folder / INDEX)
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


def edit_shard(file: Path, **tensors: torch.Tensor) -> None:
    save_file({**load_file(file), **tensors}, file)


def redirect(target: str) -> Callable[[dict[str, Any]], object]:
    return lambda index: index["weight_map"].update(dict.fromkeys(index["weight_map"], target))


def swap(index: dict[str, Any]) -> None:
    index["weight_map"] = {k: SECOND if v == FIRST else FIRST for k, v in index["weight_map"].items()}


INDICES: Mapping[str, tuple[Callable[[dict[str, Any]], object], tuple[str, ...]]] = {
    "out of the folder": (
        redirect("../two/model.safetensors"),
        ("weight_map[lm_head.weight]", "../two/model.safetensors"),
    ),
    "absolute": (redirect("/etc/passwd.safetensors"), ("weight_map[lm_head.weight]", "/etc/passwd.safetensors")),
    "missing shard": (
        redirect("model-00003-of-00003.safetensors"),
        ("model-00003-of-00003.safetensors, which is missing",),
    ),
    "wrong shard": (swap, (f"stored in {FIRST}; the weight_map expects {SECOND}", "lm_head.weight")),
    "key not in the map": (
        lambda index: index["weight_map"].pop("lm_head.weight"),
        ("missing from the weight_map: lm_head.weight",),
    ),
    "key not in any shard": (
        lambda index: index["weight_map"].update(x=FIRST),
        (f"named by the weight_map but missing from {FIRST}: x",),
    ),
    "no metadata": (lambda index: index.pop("metadata"), (f"{INDEX}: its metadata is",)),
    "no weight_map": (lambda index: index.pop("weight_map"), (f"{INDEX}: its weight_map is",)),
    "wrong total_size": (lambda index: index["metadata"].update(total_size=1), ("its total_size is 1; expected",)),
}


@pytest.mark.parametrize(("change", "fragments"), INDICES.values(), ids=INDICES)
def test_an_index_that_is_wrong_is_refused(
    site: Site, refused: Refused, change: Callable[[dict[str, Any]], object], fragments: tuple[str, ...]
) -> None:
    edit_index(shard(site), change)
    refused("{root}/one", *fragments)


def test_a_tensor_in_two_shards_is_refused(site: Site, refused: Refused) -> None:
    folder = shard(site)
    edit_shard(folder / SECOND, **{"lm_head.weight": torch.zeros(6, 4)})
    refused("{root}/one: stored twice", f"{FIRST} and {SECOND}", "lm_head.weight")


def test_a_missing_shard_is_refused(site: Site, refused: Refused) -> None:
    (shard(site) / SECOND).unlink()
    refused("{root}/one", SECOND, "which is missing")


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(site: Site, refused: Refused) -> None:
    folder = shard(site)
    (folder / SECOND).rename(site.root / "elsewhere.safetensors")
    (folder / SECOND).symlink_to("../elsewhere.safetensors")
    refused("{root}/one", SECOND)


def test_an_index_left_beside_a_single_file_is_refused(site: Site, refused: Refused) -> None:
    folder = shard(site)
    save_file(site.tensors("one"), folder / "model.safetensors")
    refused("{root}/one: holds model.safetensors beside", "perhaps left over from another save")


def test_shards_left_beside_new_ones_are_refused(site: Site, refused: Refused) -> None:
    folder = shard(site)
    shutil.copy(folder / FIRST, folder / "model-00001-of-00003.safetensors")
    refused("{root}/one: holds model-00001-of-00003.safetensors beside", "perhaps left over from another save")


def test_an_index_that_is_no_json_is_refused(site: Site, refused: Refused) -> None:
    (shard(site) / INDEX).write_text("{")
    refused("{root}/one", INDEX, "JSON")


def only(site: Site, file: str) -> None:
    (site.root / "one" / "model.safetensors").unlink()
    (site.root / "one" / file).write_bytes(b"\x80\x02}q\x00.")


FOLDERS: Mapping[str, tuple[Callable[[Site], object], tuple[str, ...]]] = {
    "pickle only": (
        lambda site: only(site, "pytorch_model.bin"),
        ("{root}/one: holds only pickles (pytorch_model.bin), which can run code when loaded",),
    ),
    "no weights": (
        lambda site: (site.root / "one" / "model.safetensors").unlink(),
        ("{root}/one: holds", "expected model.safetensors or model.safetensors.index.json"),
    ),
    "no config": (
        lambda site: (site.root / "one" / "config.json").unlink(),
        ("{root}/one/config.json: is missing; expected a transformers model folder",),
    ),
    "config that is no JSON": (
        lambda site: (site.root / "one" / "config.json").write_text("{,}"),
        ("{root}/one/config.json", "JSON"),
    ),
    "quantised": (
        lambda site: (site.root / "one" / "config.json").write_text('{"quantization_config": {"bits": 4}}'),
        ("{root}/one/config.json: quantization_config is", "dequantise the model"),
    ),
    "nowhere": (
        lambda site: site.recipe["models"][0].update(model=str(site.root / "nowhere")),
        ("{root}/recipe.yaml:1:", "{root}/nowhere: is no folder", "no hub id such as org/name"),
    ),
    "not on the hub": (
        lambda site: site.recipe["models"][0].update(model="no-such-org/no-such-model"),
        ("{root}/recipe.yaml:1:", "no-such-org/no-such-model: is no folder", "cannot be had from the hub"),
    ),
    "a file": (
        lambda site: site.recipe["models"][0].update(model=str(site.root / "one" / "model.safetensors")),
        ("{root}/one/model.safetensors", "is a file; expected the folder it lies in"),
    ),
    "a revision of a folder": (
        lambda site: site.recipe["models"][0].update(model=f"{site.root / 'one'}@main"),
        ("{root}/one", "has no revisions"),
    ),
    "base nowhere": (
        lambda site: site.recipe.update(base_model=str(site.root / "nowhere")),
        ("{root}/recipe.yaml:1:", "{root}/nowhere: is no folder"),
    ),
}


@pytest.mark.parametrize(("change", "fragments"), FOLDERS.values(), ids=FOLDERS)
def test_a_folder_that_is_no_model_is_refused(
    site: Site, refused: Refused, change: Callable[[Site], object], fragments: tuple[str, ...]
) -> None:
    change(site)
    refused(*fragments)


def store(site: Site, name: str, **changes: torch.Tensor | None) -> None:
    """Write a full model anew, with tensors replaced or (None) left out; no sidecars."""
    tensors = {key.replace("__", "."): value for key, value in {**site.tensors(name), **changes}.items()}
    write_checkpoint(site.root / name, {key: value for key, value in tensors.items() if value is not None})
    for each in ("one", "two"):
        (site.root / each / "precision.safetensors").unlink(missing_ok=True)
    site.recipe["merge_method"] = "task_arithmetic"


HEAD = "lm_head.weight"
TENSORS: Mapping[str, tuple[Callable[[Site], object], tuple[str, ...]]] = {
    "missing": (
        lambda site: store(site, "two", **{HEAD: None}),
        ("{root}/two: has no tensor lm_head.weight; expected the tensors of {root}/base",),
    ),
    "extra": (
        lambda site: store(site, "two", extra=torch.zeros(2)),
        ("{root}/two: has a tensor extra that {root}/base has not",),
    ),
    "shape": (
        lambda site: store(site, "two", **{"model.layers.0.q_proj.weight": torch.zeros(4, 5)}),
        ("model.layers.0.q_proj.weight: shape (4, 5) in {root}/two, (4, 4) in {root}/base; expected equal shapes",),
    ),
    "vocabulary": (
        lambda site: store(site, "two", **{HEAD: torch.zeros(8, 4), "model.embed_tokens.weight": torch.zeros(8, 4)}),
        (
            "lm_head.weight: shape (8, 4) in {root}/two, (6, 4) in {root}/base",
            "model.embed_tokens.weight: shape (8, 4)",
            "was the vocabulary resized?",
        ),
    ),
    "int8": (
        lambda site: store(site, "two", **{HEAD: torch.zeros(6, 4, dtype=torch.int8)}),
        ("lm_head.weight: dtype I8 in {root}/two, F32 in {root}/base; expected the same dtype",),
    ),
    "fp8": (
        lambda site: store(site, "base", **{HEAD: torch.zeros(6, 4).to(torch.float8_e4m3fn)}),
        ("{root}/base/model.safetensors: lm_head.weight is stored as F8_E4M3",),
    ),
    "mixed floats": (
        lambda site: store(site, "two", **{HEAD: torch.zeros(6, 4, dtype=torch.bfloat16)}),
        ("lm_head.weight: dtype F32", "BF16 in {root}/two; expected one dtype, or `out_dtype` in the recipe"),
    ),
    "buffer": (
        lambda site: store(site, "two", **{"model.ids": torch.arange(3) + 1}),
        ("model.ids: I64 is not a weight and is copied, but {root}/two holds other values",),
    ),
    "NaN": (
        lambda site: store(site, "two", **{HEAD: torch.full((6, 4), float("nan"))}),
        ("lm_head.weight: 24 of 24 values in {root}/two ({root}/two/model.safetensors) are NaN or infinite",),
    ),
}


@pytest.mark.parametrize(("change", "fragments"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_do_not_fit_together_are_refused(
    site: Site, refused: Refused, change: Callable[[Site], object], fragments: tuple[str, ...]
) -> None:
    change(site)
    refused(*fragments)


def test_everything_that_is_wrong_is_told_at_once(site: Site, refused: Refused) -> None:
    (site.root / "base" / "config.json").unlink()
    (site.root / "one" / "model.safetensors").write_bytes(b"")
    (site.root / "two" / "precision.safetensors").write_bytes(b"")
    message = refused("base/config.json", "one/model.safetensors", "two/precision.safetensors")
    assert len(message.splitlines()) == 3
