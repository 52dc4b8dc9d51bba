"""Adapters merged into adapters, loaded by PEFT: the logits are those of the dense merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_bayes.errors import PlanError
from mergekit_bayes.merge.run import merge
from tests.merge.adapter_builders import dense_merge, load_adapted, load_base, logits, quiet, save_adapter

Adapters = Callable[..., Path]

ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
GPT2 = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}


@dataclass(frozen=True)
class Case:
    """Adapters of one model, each with the weight it is merged with."""

    model: str
    adapters: tuple[tuple[float, Mapping[str, Any]], ...]
    recipe: Mapping[str, Any] = field(default_factory=dict)


CASES = {
    "one rank": Case("llama", ((0.7, ATTENTION), (0.4, ATTENTION))),
    "three ranks": Case("llama", ((0.7, {**ATTENTION, "r": 1}), (0.4, {**ATTENTION, "r": 3}), (0.5, ATTENTION))),
    "alphas": Case("llama", ((0.7, {**ATTENTION, "lora_alpha": 3}), (0.4, {**ATTENTION, "lora_alpha": 32}))),
    "rank-stabilised": Case("llama", ((0.7, {**ATTENTION, "use_rslora": True}), (0.4, ATTENTION))),
    "patterns": Case(
        "llama",
        (
            (0.7, {**ATTENTION, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.v_proj": 5}}),
            (0.4, {**ATTENTION, "rank_pattern": {r".*layers\.0.*": 1}, "use_rslora": True}),
        ),
    ),
    "removal": Case("llama", ((1.0, ATTENTION), (-0.5, ATTENTION))),
    "disjoint modules": Case("llama", ((0.7, {"target_modules": ["q_proj"]}), (0.4, {"target_modules": ["up_proj"]}))),
    "overlapping modules": Case(
        "llama",
        ((0.7, {"target_modules": ["q_proj", "down_proj"], "r": 2}), (-0.4, {"target_modules": ["q_proj", "v_proj"]})),
    ),
    "some layers": Case("llama", ((0.7, {**ATTENTION, "layers_to_transform": [1]}), (0.4, ATTENTION))),
    "excluded modules": Case("llama", ((0.7, {**ATTENTION, "exclude_modules": ["layers.0.self_attn.q_proj"]}),)),
    "a regular expression": Case("llama", ((0.7, {"target_modules": r".*layers\.1\..*(q|up)_proj"}), (0.4, ATTENTION))),
    "all linear layers": Case("llama", ((0.7, {"target_modules": "all-linear"}), (0.4, ATTENTION))),
    "embedding": Case(
        "llama", ((0.7, {"target_modules": ["embed_tokens", "q_proj"]}), (0.4, {"target_modules": ["embed_tokens"]}))
    ),
    "embedding of one": Case("llama", ((0.7, {"target_modules": ["embed_tokens", "q_proj"]}), (0.4, ATTENTION))),
    "head adapted": Case("llama", ((0.7, {"target_modules": ["lm_head", "q_proj"]}), (0.4, ATTENTION))),
    "head stored whole": Case(
        "llama",
        ((0.7, {**ATTENTION, "modules_to_save": ["lm_head"]}), (0.4, {**ATTENTION, "modules_to_save": ["lm_head"]})),
    ),
    "head stored whole by one": Case(
        "llama", ((0.7, {**ATTENTION, "modules_to_save": ["lm_head"]}), (-0.4, ATTENTION))
    ),
    "transposed weights": Case("gpt2", ((0.7, GPT2), (0.4, {**GPT2, "r": 2}))),
    "transposed and not": Case("gpt2", ((0.7, {**GPT2, "target_modules": ["c_attn", "lm_head"]}), (0.4, GPT2))),
    "tied embedding": Case("gpt2", ((0.7, {**GPT2, "target_modules": ["c_attn", "wte"]}), (0.4, GPT2))),
    "tied embedding of a llama": Case("llama_tied", ((0.7, {"target_modules": ["embed_tokens"]}), (0.4, ATTENTION))),
    "tied head adapted": Case("llama_tied", ((0.7, {"target_modules": ["lm_head"]}), (0.4, ATTENTION))),
    "tied head stored whole": Case(
        "llama_tied", ((0.7, {**ATTENTION, "modules_to_save": ["lm_head"]}), (0.4, ATTENTION))
    ),
    "classifier": Case(
        "bert",
        (
            (0.7, {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]}),
            (0.4, {"target_modules": ["query"], "modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}),
        ),
    ),
}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Adapters:
    """`adapters("llama", seed=1, r=2)`: the folder of an adapter; built once."""
    root = tmp_path_factory.mktemp("adapters")
    built: dict[str, Path] = {}

    def adapter(model: str, *, seed: int, **lora: Any) -> Path:
        key = repr((model, seed, sorted(lora.items())))
        if key not in built:
            built[key] = save_adapter(tiny_checkpoint(model), root / f"{model}-{len(built)}", seed=seed, **lora)
        return built[key]

    return adapter


def inputs(case: Case, adapters: Adapters) -> tuple[list[Path], list[float], list[dict[str, Any]]]:
    """Folders and weights of a case, and its models as a recipe has them."""
    folders = [adapters(case.model, seed=1 + i, **lora) for i, (_, lora) in enumerate(case.adapters)]
    weights = [weight for weight, _ in case.adapters]
    models = [{"model": str(f), "parameters": {"weight": w}} for f, w in zip(folders, weights, strict=True)]
    return folders, weights, models


def assert_same_logits(seen: Any, wanted: Any) -> None:
    torch.testing.assert_close(logits(seen), logits(wanted), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_merged_adapter_and_merged_checkpoint_give_the_logits_of_the_dense_merge(
    name: str, adapters: Adapters, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    case = CASES[name]
    base = tiny_checkpoint(case.model)
    folders, weights, models = inputs(case, adapters)
    recipe = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}
    merge(recipe, tmp_path / "adapter", threads=1)
    wanted = dense_merge(base, folders, weights)
    assert float((logits(load_base(base)) - logits(wanted)).abs().max()) > 0.01
    with quiet():
        assert_same_logits(load_adapted(base, tmp_path / "adapter"), wanted)
    full = {**recipe, "space": "full"}
    if name.startswith("tied embedding"):
        with pytest.raises(PlanError, match=r"changes .*(wte|embed_tokens)\.weight, which is also the output head"):
            merge(full, tmp_path / "full")
        return
    merge(full, tmp_path / case.model, threads=1)
    assert_same_logits(load_base(tmp_path / case.model), wanted)
