"""The tiny checkpoints other tests stand on are what they claim to be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_models import TINY_MODELS, tiny_model, uniform


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("name", TINY_MODELS)
def test_shards_hold_the_same_weights_as_one_file(name: str, tiny_checkpoint: Callable[..., Path]) -> None:
    single, sharded = tiny_checkpoint(name), tiny_checkpoint(name, max_shard_size="8KB")
    assert (single / "model.safetensors").is_file()
    weight_map = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) > 1
    whole, pieces = _tensors(single), _tensors(sharded)
    assert whole.keys() == pieces.keys() == weight_map.keys()
    assert all(torch.equal(whole[key], pieces[key]) for key in whole)


@pytest.mark.parametrize(("name", "tied"), [("llama", False), ("llama_tied", True), ("gpt2", True)])
def test_tied_heads_are_not_stored(name: str, tied: bool, tiny_checkpoint: Callable[..., Path]) -> None:
    assert ("lm_head.weight" in _tensors(tiny_checkpoint(name))) is not tied


def test_drift_moves_the_model_of_seed_zero_a_little() -> None:
    base = tiny_model("llama").state_dict()
    moved = tiny_model("llama", seed=3, drift=0.01).state_dict()
    distances = [(moved[key] - base[key]).abs().max().item() for key in base]
    assert all(0 < distance <= 0.0101 for distance in distances)


def test_values_do_not_depend_on_the_machine() -> None:
    expected = [-0.06740584969520569, -0.06042000651359558, 0.04054364562034607]
    assert uniform("model.norm.weight", (3,), seed=1, half_width=0.25).tolist() == expected


def test_adapter_has_two_factors_per_module(tiny_adapter: Callable[..., Path]) -> None:
    tensors = load_file(tiny_adapter("llama", seed=1, r=2) / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 2  # layers, modules, factors
    assert all(tensor.abs().max() > 0 and 2 in tensor.shape for tensor in tensors.values())
