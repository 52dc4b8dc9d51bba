"""An adapter on its base: which weight each of its tensors changes, in which orientation, and what does not belong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_bayes import load_recipe, plan_merge
from mergekit_bayes.checkpoint.adapter import open_adapter
from mergekit_bayes.checkpoint.index import open_checkpoint
from mergekit_bayes.errors import MergekitBayesError, PlanError
from mergekit_bayes.merge.attach import Attached, attach, embeddings_changed, recorded_bases
from mergekit_bayes.merge.inputs import Input, open_input
from mergekit_bayes.merge.run import merge, run_merge
from tests.merge.builders import (
    CONFIG,
    factor_names,
    random_precisions,
    random_tensors,
    read_json,
    read_tensors,
    tensor_infos,
    write_adapter,
    write_checkpoint,
    write_precisions,
)
from tests.merge.truth import lora_precision, lora_update, merge_tensor

TIED = {**CONFIG, "tie_word_embeddings": True, "architectures": ["ToyForCausalLM"], "vocab_size": 6}
SHAPES = {"model.embed.weight": (6, 4), "model.up.weight": (5, 4), "model.up.bias": (5,)}

Shapes = Mapping[str, tuple[int, ...]]


def factors(out_features: int, in_features: int, *, seed: int = 1) -> tuple[Tensor, Tensor]:
    drawn = random_tensors(seed, {"a": (2, in_features), "b": (out_features, 2)})
    return drawn["a"], drawn["b"]


def base_in(root: Path, shapes: Shapes = SHAPES, config: Mapping[str, Any] = TIED) -> Path:
    return write_checkpoint(root / "base", random_tensors(0, shapes), config=config)


def attached(base: Path, adapter: Path) -> tuple[Attached, list[MergekitBayesError]]:
    return attach(open_input(str(adapter), None, base_dir=adapter), open_checkpoint(base))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_names_may_lack_the_outermost_prefix(prefix: str, tmp_path: Path) -> None:
    base = base_in(tmp_path, {f"{prefix}up.weight": (5, 4), f"{prefix}norm.weight": (4,)})
    adapter = write_adapter(tmp_path / "a", {"model.up": factors(5, 4)}, saved={"model.norm.weight": torch.ones(4)})
    found, problems = attached(base, adapter)
    assert not problems
    assert set(found.modules) == {f"{prefix}up.weight"}
    assert set(found.saved) == {f"{prefix}norm.weight"}
    assert not found.heads
    assert not found.fresh


@pytest.mark.parametrize("flag", [False, True])
def test_the_base_decides_the_orientation(flag: bool, tmp_path: Path) -> None:
    base = base_in(tmp_path, {"up.weight": (5, 4), "down.weight": (5, 4)})
    adapter = write_adapter(tmp_path / "a", {"up": factors(5, 4), "down": factors(4, 5)}, fan_in_fan_out=flag)
    found, problems = attached(base, adapter)
    assert not problems
    assert {name: module.transposed for name, module in found.modules.items()} == {
        "down.weight": True,
        "up.weight": False,
    }


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_tied_head_gets_weights_of_its_own(whole: bool, flag: bool, tmp_path: Path) -> None:
    base = base_in(tmp_path)
    a, b = factors(6, 4)
    modules = {"model.up": factors(5, 4), **({} if whole else {"lm_head": (a, b)})}
    saved = {"lm_head.weight": torch.full((6, 4), 2.0)} if whole else {}
    adapter = write_adapter(tmp_path / "a", modules, saved=saved, fan_in_fan_out=flag)
    found, problems = attached(base, adapter)
    assert not problems
    assert {name: tensor.name for name, tensor in found.heads.items()} == {"lm_head.weight": "model.embed.weight"}
    models = [{"model": str(adapter), "parameters": {"weight": 0.5}}]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}
    merge({**recipe, "space": "full"}, tmp_path / "full")
    embedding = read_tensors(base)["model.embed.weight"]
    wanted = embedding + 0.5 * (2.0 - embedding) if whole else embedding + 0.5 * (b @ a)
    seen = read_tensors(tmp_path / "full")
    torch.testing.assert_close(seen["lm_head.weight"], wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(seen["model.embed.weight"], embedding)
    assert read_json(tmp_path / "full" / "config.json")["tie_word_embeddings"] is False
    merge(recipe, tmp_path / "adapter")
    if whole:
        stored = read_tensors(tmp_path / "adapter", "adapter_model")["base_model.model.lm_head.weight"]
        torch.testing.assert_close(stored, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("shapes", "config"),
    [
        (SHAPES, {**TIED, "tie_word_embeddings": False}),
        (SHAPES, {**TIED, "tie_word_embeddings": None, "text_config": {"tie_word_embeddings": False}}),
        ({**SHAPES, "model.position_embed.weight": (6, 4)}, TIED),
        ({"model.up.weight": (6, 4)}, TIED),
        ({"model.embed.weight": (7, 4)}, TIED),
    ],
    ids=["untied", "untied text", "two embeddings", "no embedding", "another vocabulary"],
)
def test_a_head_that_is_not_certainly_tied_is_no_weight_of_the_base(
    shapes: Shapes, config: Mapping[str, Any], tmp_path: Path
) -> None:
    if config["tie_word_embeddings"] is None:
        config = {key: value for key, value in config.items() if key != "tie_word_embeddings"}
    base = base_in(tmp_path, shapes, config)
    adapter = write_adapter(
        tmp_path / "a", {"lm_head": factors(6, 4)}, saved={"score.weight": torch.ones(6, 4), "bias": torch.ones(2)}
    )
    found, problems = attached(base, adapter)
    assert [str(problem) for problem in problems] == [
        f"{adapter}: adapts lm_head, but {base} has no such tensor; expected an adapter trained on this base"
    ]
    assert found.fresh == ("bias", "score.weight")


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({}, ["model.embed.weight"]),
        ({"tie_word_embeddings": False}, []),
        ({"architectures": ["ToyForSequenceClassification"]}, []),
        ({"architectures": None}, []),
        ({"architectures": ["ToyForConditionalGeneration"]}, ["model.embed.weight"]),
        ({"vocab_size": 7}, []),
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_an_embedding_that_is_also_the_head(
    change: Mapping[str, Any], names: list[str], whole: bool, tmp_path: Path
) -> None:
    base = base_in(tmp_path, config={**TIED, **change})
    if whole:
        copy = {"model.embed.weight": torch.ones(6, 4)}
        adapter = write_adapter(tmp_path / "a", {"model.up": factors(5, 4)}, saved=copy)
    else:
        adapter = write_adapter(tmp_path / "a", {"model.embed": factors(4, 6)}, embeddings=["model.embed"])
    found, problems = attached(base, adapter)
    assert not problems
    assert embeddings_changed(found, open_checkpoint(base)) == names
    models = [{"model": str(adapter), "parameters": {"weight": 0.5}}]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}
    merge(recipe, tmp_path / "adapter")
    if names:
        with pytest.raises(PlanError, match=r"changes model\.embed\.weight, which is also the output head"):
            merge({**recipe, "space": "full"}, tmp_path / "full")
    else:
        merge({**recipe, "space": "full"}, tmp_path / "full")


@pytest.mark.parametrize(
    ("text", "recorded"),
    [
        (None, []),
        ("no json", []),
        ("[1]", []),
        (json.dumps({"base_fingerprint": 3}), []),
        (json.dumps({"base_fingerprint": None}), []),
        (json.dumps({"base_fingerprint": "blake2b-16:00"}), ["blake2b-16:00"]),
    ],
)
def test_only_a_merge_writes_its_base_into_the_header(text: str | None, recorded: list[str], tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "a", {"model.up": factors(5, 4)})
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file), file, metadata={"format": "pt", **({} if text is None else {"mergekit_bayes": text})})
    assert recorded_bases(Input("a", None, open_adapter(adapter), None)) == recorded


def test_the_prior_of_a_tied_head_is_that_of_its_embedding(tmp_path: Path) -> None:
    base = base_in(tmp_path)
    known = random_precisions(3, SHAPES, above=0.1)
    write_precisions(base, known)
    pair = factors(6, 4)
    adapter = write_adapter(tmp_path / "a", {"lm_head": pair})
    shapes = {name: info.shape for name, info in tensor_infos(adapter).items()}
    spread = random_precisions(4, shapes, above=1.0)
    write_precisions(adapter, spread)
    models = [{"model": str(adapter), "parameters": {"weight": 0.5}}]
    recipe = {"merge_method": "gradient_matching", "base_model": str(base), "models": models, "dtype": "float64"}
    merge({**recipe, "output": {"rank": 4}}, tmp_path / "out")
    prior = (torch.zeros(6, 4), known["model.embed.weight"])
    precisions = [spread[name] for name in factor_names("lm_head")]
    source = (lora_update(*pair, 1.0), lora_precision(*pair, *precisions, 1.0))
    wanted = merge_tensor("gradient_matching", prior, [source], [0.5]).mean
    stored = read_tensors(tmp_path / "out", "adapter_model")
    a, b = (stored[name] for name in factor_names("lm_head"))
    torch.testing.assert_close(b @ a, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("where", ["base", "source"])
def test_updates_of_weights_that_take_several_blocks(where: str, tmp_path: Path) -> None:
    """Blocks of an updated weight end where its rows end, whether base or source brings the update."""
    shape = (300, 301)  # more than one block, and no block is a whole number of rows by itself
    base = write_checkpoint(tmp_path / "base", random_tensors(0, {"up.weight": shape}))
    other = write_checkpoint(tmp_path / "other", random_tensors(1, {"up.weight": shape}))
    a, b = factors(*shape)
    adapter = write_adapter(tmp_path / "a", {"up": (a, b)})
    adapted = f"{base}+{adapter}"
    names = (adapted, str(other)) if where == "base" else (str(other), adapted)
    models = [{"model": names[1], "parameters": {"weight": 0.25}}]
    recipe = load_recipe({"merge_method": "task_arithmetic", "base_model": names[0], "models": models})
    run_merge(plan_merge(recipe, tmp_path / "out"), max_memory=1)
    mine, theirs = read_tensors(base)["up.weight"] + b @ a, read_tensors(other)["up.weight"]
    first, second = (mine, theirs) if where == "base" else (theirs, mine)
    wanted = first + 0.25 * (second - first)
    torch.testing.assert_close(read_tensors(tmp_path / "out")["up.weight"], wanted, rtol=1e-4, atol=1e-4)
