"""Adapters merged into adapters, loaded by PEFT: the logits are those of the dense merge."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_bayes import load_recipe, plan_merge
from mergekit_bayes.checkpoint.reference import ResolvedFolder
from mergekit_bayes.errors import PlanError
from mergekit_bayes.merge import inputs as opening
from mergekit_bayes.merge.plan import MergePlan
from mergekit_bayes.merge.run import merge
from tests.merge.adapter_builders import dense_merge, load_adapted, load_base, logits, quiet, save_adapter
from tests.merge.builders import (
    random_precisions,
    random_tensors,
    read_json,
    read_tensors,
    tensor_infos,
    write_adapter,
    write_checkpoint,
    write_precisions,
)

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
    "head and embedding adapted as one": Case(
        "llama_tied", ((0.7, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}), (0.4, ATTENTION))
    ),
    "head and embedding stored whole as one": Case(
        "llama_tied",
        ((0.7, {**ATTENTION, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}), (0.4, ATTENTION)),
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


# --- other arithmetic -------------------------------------------------------------------------------------------------


def test_a_soup_of_adapters_is_the_soup_of_their_models(
    adapters: Adapters, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_checkpoint("llama")
    folders, _, models = inputs(CASES["overlapping modules"], adapters)
    recipe = {"merge_method": "linear", "models": models}  # weights 0.7 and -0.4, which are normalised
    merge(recipe, tmp_path / "out", threads=1)
    assert_same_logits(load_adapted(base, tmp_path / "out"), dense_merge(base, folders, [0.7 / 0.3, -0.4 / 0.3]))


@pytest.mark.parametrize("out_dtype", [None, "bfloat16"])
def test_bfloat16_adapters_are_rounded_once(
    out_dtype: str | None, adapters: Adapters, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_checkpoint("llama")
    dtype = torch.bfloat16 if out_dtype is None else torch.float32
    folders = [adapters("llama", seed=seed, dtype=dtype, r=seed, **ATTENTION) for seed in (1, 2)]
    models = [{"model": str(f), "parameters": {"weight": w}} for f, w in zip(folders, (0.75, -0.5), strict=True)]
    recipe = {"merge_method": "task_arithmetic", "base_model": str(base), "models": models}
    merge({**recipe, "out_dtype": "float32"}, tmp_path / "exact", threads=1)
    merge({**recipe, **({"out_dtype": out_dtype} if out_dtype else {})}, tmp_path / "out", threads=1)
    exact, rounded = (read_tensors(tmp_path / name, "adapter_model") for name in ("exact", "out"))
    assert exact.keys() == rounded.keys()
    for name, factor in rounded.items():
        assert factor.dtype == torch.bfloat16
        assert torch.equal(factor, exact[name].to(torch.bfloat16))
    assert_same_logits(load_adapted(base, tmp_path / "exact"), dense_merge(base, folders, (0.75, -0.5)))
    seen = logits(load_adapted(base, tmp_path / "out", dtype=torch.bfloat16)).float()
    wanted = logits(dense_merge(base, folders, (0.75, -0.5)))
    assert float(torch.linalg.norm(seen - wanted) / torch.linalg.norm(wanted)) < 0.05


def precise(adapter: Path, seed: int, folder: Path) -> Path:
    """A copy of an adapter with log-normal precisions of all it has trained."""
    shutil.copytree(adapter, folder)
    shapes = {name: info.shape for name, info in tensor_infos(folder).items()}
    write_precisions(folder, random_precisions(seed, shapes, above=0.5))
    return folder


@pytest.mark.parametrize("method", ["gradient_matching", "posterior", "hessian_weighted"])
@pytest.mark.parametrize(
    "name", ["overlapping modules", "embedding of one", "head stored whole by one", "transposed weights"]
)
def test_with_precisions_adapter_and_checkpoint_agree(
    name: str, method: str, adapters: Adapters, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """The posterior of dW is the same whether it ends as factors of full rank or in the weights."""
    base = tiny_checkpoint(CASES[name].model)
    folders, _, _ = inputs(CASES[name], adapters)
    sources = [precise(folder, seed, tmp_path / f"source{seed}") for seed, folder in enumerate(folders)]
    models = [{"model": str(f), "parameters": {"weight": w}} for f, w in zip(sources, (0.5, 0.75), strict=True)]
    recipe = {"merge_method": method, "base_model": str(base), "models": models, "precision": {"prior": 0.01}}
    result = merge({**recipe, "output": {"rank": 48}}, tmp_path / "adapter", threads=1)
    assert all(layer.get("lost_energy", 0.0) == 0.0 for layer in result.report["layers"].values())
    full = merge({**recipe, "space": "full"}, tmp_path / "full", threads=1)
    assert_same_logits(load_adapted(base, tmp_path / "adapter"), load_base(tmp_path / "full"))
    assert float((logits(load_base(base)) - logits(load_base(tmp_path / "full"))).abs().max()) > 0.01
    for source in sources:
        found = [report["mismatch"][str(source)]["total"] for report in (result.report, full.report)]
        assert found[0] == pytest.approx(found[1], rel=1e-4)


# --- the configuration ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "targets"),
    [
        ({"target_modules": ["q_proj"]}, {"target_modules": ["q_proj"]}, ["q_proj"]),
        ({"target_modules": ["q_proj"]}, {"target_modules": ["v_proj"]}, ["q_proj", "v_proj"]),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0]},
            {"target_modules": ["q_proj"], "layers_to_transform": [0]},
            ["model.layers.0.self_attn.q_proj"],
        ),
        (
            {"target_modules": ["q_proj"]},
            {"target_modules": r".*1\..*\.v_proj"},
            [*(f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)), "model.layers.1.self_attn.v_proj"],
        ),
    ],
)
def test_targets_reach_what_was_adapted_and_nothing_else(
    first: dict[str, Any],
    second: dict[str, Any],
    targets: list[str],
    adapters: Adapters,
    tiny_checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folders = [adapters("llama", seed=seed, **lora) for seed, lora in enumerate((first, second))]
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in folders]
    merge({"merge_method": "linear", "models": models}, tmp_path / "out", threads=1)
    config = read_json(tmp_path / "out" / "adapter_config.json")
    assert sorted(config["target_modules"]) == sorted(targets)
    loaded = load_adapted(tiny_checkpoint("llama"), tmp_path / "out")
    factors = {name for name, _ in loaded.named_parameters() if "lora_" in name}
    stored = {name.replace(".weight", ".default.weight") for name in read_tensors(tmp_path / "out", "adapter_model")}
    assert factors == stored


@pytest.mark.parametrize("task_type", [None, "CAUSAL_LM"])
def test_peft_finds_base_and_class_by_itself(
    task_type: str | None, adapters: Adapters, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    import peft

    base = tiny_checkpoint("llama")
    folders = [adapters("llama", seed=seed, task_type=task_type, r=seed, **ATTENTION) for seed in (1, 2)]
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in folders]
    merge({"merge_method": "linear", "models": models}, tmp_path / "out", threads=1)
    auto = peft.AutoPeftModel if task_type is None else peft.AutoPeftModelForCausalLM
    with quiet():
        seen = auto.from_pretrained(tmp_path / "out").eval()
    assert_same_logits(seen, dense_merge(base, folders, (0.5, 0.5)))


def test_the_configuration_is_plain_lora_of_scaling_one(adapters: Adapters, tmp_path: Path) -> None:
    lora = {**ATTENTION, "use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 2}}
    folders = [adapters("llama", seed=seed, **lora) for seed in (1, 2)]
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in folders]
    merge({"merge_method": "linear", "models": models}, tmp_path / "out", threads=1)
    config = read_json(tmp_path / "out" / "adapter_config.json")
    # ranks 3 + 3 of q_proj are padded to the 4 + 4 of v_proj: readers such as vLLM know one rank
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (8, 8, False)
    assert config["bias"] == "none"
    assert config["modules_to_save"] is None
    assert not {"rank_pattern", "alpha_pattern"} & config.keys()
    shapes = {name: tuple(tensor.shape) for name, tensor in read_tensors(tmp_path / "out", "adapter_model").items()}
    assert {shape[0] for name, shape in shapes.items() if "lora_A" in name} == {8}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "rank 8" in card
    assert "library_name: peft" in card


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def plan_of(root: Path, *configs: Mapping[str, Any], base_model: str | None = None) -> MergePlan:
    """The plan of a soup of adapters with these configurations."""
    models = []
    for seed, config in enumerate(configs):
        drawn = random_tensors(seed, {"a": (2, 4), "b": (5, 2)})
        folder = write_adapter(root / f"adapter{seed}", {"up": (drawn["a"], drawn["b"])}, **config)
        models.append({"model": str(folder), "parameters": {"weight": 0.5}})
    recipe = {"merge_method": "linear", "models": models}
    return plan_merge(load_recipe({**recipe, **({} if base_model is None else {"base_model": base_model})}))


def test_a_base_of_the_hub_is_named_with_the_commit_that_was_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_checkpoint(tmp_path / "base", random_tensors(9, {"up.weight": (5, 4)}))

    def resolve(reference: str, revision: str | None, *, base_dir: Path) -> ResolvedFolder:
        return ResolvedFolder(base, COMMIT) if reference == "org/base" else ResolvedFolder(Path(reference), None)

    monkeypatch.setattr(opening, "resolve", resolve)
    config = plan_of(tmp_path, {}, {}, base_model="org/base@main").configuration
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", COMMIT)


def test_what_adapters_say_differently_is_noted(tmp_path: Path) -> None:
    first = {"base_model_name_or_path": "org/base", "revision": "v1", "task_type": "CAUSAL_LM", "r": 2}
    plan = plan_of(tmp_path, {}, first, {"base_model_name_or_path": "other/base", "task_type": "SEQ_CLS"})
    config = plan.configuration
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "v1")
    assert config["task_type"] == "CAUSAL_LM"
    assert plan.notes == (
        "the adapters name different bases (org/base, other/base); the output names org/base",
        "adapter_config.json: task_type differs between the adapters; the output has 'CAUSAL_LM'",
    )
    assert not plan_of(tmp_path / "same", first, first).notes


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (["head"], ["head"]),
        (["head", "unused"], ["head"]),
        (["out"], ["head.dense", "out"]),
        (None, ["head.dense", "head.out"]),
    ],
)
def test_modules_stored_whole_are_named_as_the_adapters_name_them(
    named: list[str] | None, expected: list[str], tmp_path: Path
) -> None:
    saved = {
        "head.dense.weight": torch.ones(2, 4),
        "head.dense.bias": torch.ones(2),
        "head.out.weight": torch.ones(2, 2),
    }
    config = plan_of(tmp_path, *({"saved": saved, "modules_to_save": named} for _ in range(2))).configuration
    assert config["modules_to_save"] == expected
