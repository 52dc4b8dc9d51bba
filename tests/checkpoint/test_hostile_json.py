"""Whatever JSON a stranger puts into a folder, opening it succeeds or fails with an error of this library."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from mergekit_bayes.checkpoint.adapter import open_adapter
from mergekit_bayes.checkpoint.index import open_checkpoint
from mergekit_bayes.checkpoint.sidecar import SidecarMetadata
from mergekit_bayes.errors import CheckpointError, PlanError
from tests.checkpoint.raw_files import write_folder

SHARD = "model-00001-of-00001.safetensors"
texts = st.text(max_size=8) | st.sampled_from([SHARD, "q", "..", "", "(", "LORA", "none", "\ud800", "\0", "/", "nan"])
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)
INDEX_KEYS = ["metadata", "weight_map"]
CONFIG_KEYS = ["quantization_config", "text_config", "compression_config", "x"]
ADAPTER_KEYS = [
    "peft_type",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "fan_in_fan_out",
    "bias",
    "init_lora_weights",
    "use_dora",
    "lora_bias",
    "target_parameters",
    "layer_replication",
    "eva_config",
    "use_new",
    "new_config",
    "modules_to_save",
    "x",
]
SIDECAR = {"family": "diagonal", "estimator": "fisher", "space": "full", "mean_fingerprint": "blake2b-16:" + "0" * 32}


def survives(action, *arguments, **options) -> None:
    try:
        action(*arguments, **options)
    except (CheckpointError, PlanError) as error:
        message = str(error)
    else:
        return
    assert message.replace("\n", "").isprintable()
    assert len(message) < 20_000


@given(
    index=values | st.dictionaries(st.sampled_from(INDEX_KEYS), values),
    config=st.dictionaries(st.sampled_from(CONFIG_KEYS), values) | values,
)
def test_index_and_config(tmp_path_factory, index, config):
    folder = tmp_path_factory.getbasetemp() / "hostile"
    if not folder.exists():
        write_folder(folder.parent, {SHARD: ["a"]}, name=folder.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    survives(open_checkpoint, folder)


@given(st.dictionaries(st.sampled_from(ADAPTER_KEYS), values, max_size=4))
def test_adapter_config(tmp_path_factory, changes):
    folder = tmp_path_factory.getbasetemp() / "hostile adapter"
    folder.mkdir(exist_ok=True)
    factors = {"q.lora_A.weight": torch.ones(2, 5), "q.lora_B.weight": torch.ones(3, 2)}
    save_file({f"base_model.model.{name}": t for name, t in factors.items()}, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    survives(open_adapter, folder)


@given(st.dictionaries(st.sampled_from([*SidecarMetadata.__dataclass_fields__, "x"]), values, max_size=4) | values)
def test_sidecar_metadata(changes):
    whole = {"format": "mergekit_bayes.precision", "version": 1, **SIDECAR}
    content = {**whole, **changes} if isinstance(changes, dict) else changes
    survives(SidecarMetadata.from_json, json.dumps(content), where="some file")
    if isinstance(changes, dict) and changes.keys() <= SidecarMetadata.__dataclass_fields__.keys():
        survives(SidecarMetadata, **content)


@pytest.mark.parametrize(
    "text", ["1" * 10_000, "1e999999999", "-" * 1000, '"' + "\\ud800" * 10, "[" * 10**6, "\ufeff{}", "NaN"]
)
def test_single_documents(tmp_path, text):
    folder = write_folder(tmp_path, {SHARD: ["a"]}, index=text, config=text)
    survives(open_checkpoint, folder)
    survives(SidecarMetadata.from_json, text, where="some file")
