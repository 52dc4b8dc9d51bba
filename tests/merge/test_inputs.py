"""What a reference and a `precision` in a recipe lead to: checkpoints, adapters, both together, sidecars."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_bayes.errors import MergekitBayesError
from mergekit_bayes.merge.inputs import open_input
from mergekit_bayes.merge.registry import methods
from mergekit_bayes.merge.run import merge
from tests.merge.builders import (
    factor_names,
    random_precisions,
    random_tensors,
    read_precisions,
    read_tensors,
    snapshot,
    tensor_infos,
    write_adapter,
    write_checkpoint,
    write_precisions,
)
from tests.merge.truth import assert_one_rounding, lora_precision, lora_update, merge_tensor

Q0, Q1, NORM = "model.layers.0.q_proj", "model.layers.1.q_proj", "model.norm.weight"
SHAPES: Mapping[str, tuple[int, ...]] = {f"{Q0}.weight": (5, 4), f"{Q1}.weight": (5, 4), NORM: (5,)}
WEIGHTS = (0.75, 0.5)


class Adapted:
    """A checkpoint and a LoRA adapter with factor precisions on it, as files and as dense numbers."""

    def __init__(
        self, root: Path, name: str, model: Mapping[str, Tensor], seed: int, modules: Mapping[str, int]
    ) -> None:
        self.folder = root / name
        self.model = model
        self.scaling = 2.0
        shapes = {
            factor: shape
            for module, rank in modules.items()
            for factor, shape in zip(factor_names(module), ((rank, 4), (5, rank)), strict=True)
        }
        self.factors = random_tensors(seed, shapes)
        self.precisions = random_precisions(seed + 50, shapes, above=2.0)
        pairs = {module: tuple(self.factors[name] for name in factor_names(module)) for module in modules}
        largest = max(modules.values())
        patterns = {"rank_pattern": dict(modules), "alpha_pattern": {m: 2 * rank for m, rank in modules.items()}}
        write_adapter(self.folder, pairs, alpha=2 * largest, **patterns)  # type: ignore[arg-type]
        self.modules = tuple(modules)

    def describe(self, **metadata: Any) -> None:
        """Write the sidecar."""
        write_precisions(self.folder, self.precisions, num_examples=100, **metadata)

    def mean(self, name: str) -> Tensor:
        """The dense weight with the update added."""
        module = name.removesuffix(".weight")
        dense = self.model[name].double()
        if module not in self.modules:
            return dense
        a, b = (self.factors[factor] for factor in factor_names(module))
        return dense + lora_update(a, b, self.scaling)

    def precision(self, name: str, prior: float) -> Tensor | float:
        """One over the variance of the dense weight; the prior's where the adapter leaves it alone."""
        module = name.removesuffix(".weight")
        if module not in self.modules:
            return prior
        names = factor_names(module)
        return lora_precision(
            *(self.factors[factor] for factor in names), *(self.precisions[factor] for factor in names), self.scaling
        )


def write_adapted(root: Path, *, own_models: bool) -> tuple[dict[str, Tensor], list[Adapted]]:
    """A base and two adapters of different ranks, on the base or each on a model of its own."""
    base = random_tensors(0, SHAPES)
    write_checkpoint(root / "base", base)
    adapted = []
    for seed, modules in enumerate(({Q0: 2, Q1: 3}, {Q0: 1}), start=1):
        model = random_tensors(seed, SHAPES) if own_models else base
        if own_models:
            write_checkpoint(root / f"model{seed}", model)
        adapted.append(Adapted(root, f"adapter{seed}", model, seed + 20, modules))
    return base, adapted


def recipe(root: Path, method: str, references: list[str], **extra: object) -> dict[str, Any]:
    models = [{"model": ref, "parameters": {"weight": w}} for ref, w in zip(references, WEIGHTS, strict=True)]
    found = {"merge_method": method, "base_model": str(root / "base"), "models": models, "space": "full", **extra}
    return {key: value for key, value in found.items() if value is not None}


# --- adapters merged into full weights ------------------------------------------------------------------------------


FULL_CASES = [
    (method, own_models)
    for method in (each.name for each in methods() if each.scope == "element")
    for own_models in (False, True)
    # weights that the adapters' models do not share and no adapter changes have no precision
    if not (own_models and method == "hessian_weighted")
]


@pytest.mark.parametrize(("method", "own_models"), FULL_CASES)
def test_adapters_are_merged_into_full_weights(method: str, own_models: bool, tmp_path: Path) -> None:
    base, adapted = write_adapted(tmp_path, own_models=own_models)
    for seed, each in enumerate(adapted, start=1):
        each.describe(base=tmp_path / (f"model{seed}" if own_models else "base"))
    prior = 0.125
    references = [
        f"{tmp_path}/model{i}+{each.folder}" if own_models else str(each.folder)
        for i, each in enumerate(adapted, start=1)
    ]
    merge(recipe(tmp_path, method, references, precision={"prior": prior}), tmp_path / "out")

    weights = [weight / sum(WEIGHTS) for weight in WEIGHTS] if method == "linear" else list(WEIGHTS)
    written, sidecar = read_tensors(tmp_path / "out"), read_precisions(tmp_path / "out")
    for name, mean in base.items():
        sources = [(each.mean(name), each.precision(name, prior)) for each in adapted]
        pairs = list(zip(adapted, sources, weights, strict=True))
        if method == "hessian_weighted":
            # without a prior, an adapter that leaves the base's weight alone knows nothing about it
            pairs = [pair for pair in pairs if name.removesuffix(".weight") in pair[0].modules]
        if not pairs:
            assert torch.equal(written[name], adapted[0].model[name])
            continue
        wanted = merge_tensor(method, (mean, prior), [pair[1] for pair in pairs], [pair[2] for pair in pairs])
        assert_one_rounding(written[name], wanted.mean)
        if name in sidecar:
            assert_one_rounding(sidecar[name], wanted.precision)
    touched = {f"{Q0}.weight", f"{Q1}.weight"}
    assert set(sidecar) >= touched if method not in ("linear", "task_arithmetic") else not sidecar


def test_a_precision_is_needed_for_every_weight_in_which_models_differ(tmp_path: Path) -> None:
    _, adapted = write_adapted(tmp_path, own_models=True)
    for i, each in enumerate(adapted, start=1):
        each.describe(base=tmp_path / f"model{i}")
    references = [f"{tmp_path}/model{i}+{each.folder}" for i, each in enumerate(adapted, start=1)]
    with pytest.raises(MergekitBayesError) as caught:
        merge(recipe(tmp_path, "hessian_weighted", references), tmp_path / "out")
    lines = str(caught.value).splitlines()
    assert [line.split("; ")[0] for line in lines] == [
        f"{references[1]}: no precision for {Q1}.weight (precision.safetensors has none)",
        f"{references[0]}: no precision for {NORM} (precision.safetensors has none)",
        f"{references[1]}: no precision for {NORM} (precision.safetensors has none)",
    ]


PEFT_CASES: Mapping[str, tuple[str, dict[str, Any]]] = {
    "ranks": ("llama", {"r": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}),
    "transposed": ("gpt2", {"r": 3, "target_modules": ["c_attn", "c_proj"]}),
    "embedding": ("llama", {"r": 2, "target_modules": ["embed_tokens", "down_proj"]}),
    "stored whole": ("llama", {"r": 2, "modules_to_save": ["lm_head"]}),
}


@pytest.mark.filterwarnings("ignore")  # PEFT warns about what is meant here
@pytest.mark.parametrize("case", PEFT_CASES.values(), ids=PEFT_CASES)
def test_model_plus_adapter_is_what_peft_merges(
    case: tuple[str, dict[str, Any]],
    tiny_checkpoint: Callable[..., Path],
    tiny_adapter: Callable[..., Path],
    tmp_path: Path,
) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    name, lora = case
    base, adapter = tiny_checkpoint(name), tiny_adapter(name, seed=5, **lora)
    models = [{"model": f"{base}+{adapter}", "parameters": {"weight": 1.0}}]
    merge({"merge_method": "linear", "models": models}, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    peft.PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(tmp_path / "peft")
    wanted, written = read_tensors(tmp_path / "peft"), read_tensors(tmp_path / "out")
    assert sorted(written) == sorted(wanted)
    for key, value in wanted.items():
        torch.testing.assert_close(written[key], value, rtol=1e-6, atol=1e-7)
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_base_may_be_a_model_plus_adapter(tmp_path: Path) -> None:
    _, (on_base, _) = write_adapted(tmp_path, own_models=False)
    sources = [random_tensors(seed, SHAPES) for seed in (7, 8)]
    for name, tensors in zip(("one", "two"), sources, strict=True):
        write_checkpoint(tmp_path / name, tensors)
    references = [str(tmp_path / name) for name in ("one", "two")]
    base = f"{tmp_path}/base+{on_base.folder}"
    merge(recipe(tmp_path, "task_arithmetic", references, base_model=base), tmp_path / "out")
    written = read_tensors(tmp_path / "out")
    for name in SHAPES:
        start = on_base.mean(name)
        pairs = [(source[name], 1.0) for source in sources]
        assert_one_rounding(written[name], merge_tensor("task_arithmetic", (start, 1.0), pairs, WEIGHTS).mean)


def test_an_adapter_of_the_base_is_removed_by_the_model_under_it(tmp_path: Path) -> None:
    base, (on_base, _) = write_adapted(tmp_path, own_models=False)
    models = [{"model": str(tmp_path / "base"), "parameters": {"weight": 0.25}}]
    plan = {"merge_method": "task_arithmetic", "base_model": f"{tmp_path}/base+{on_base.folder}", "models": models}
    merge(plan, tmp_path / "out")
    written = read_tensors(tmp_path / "out")
    for name, mean in base.items():
        assert_one_rounding(written[name], 0.75 * on_base.mean(name) + 0.25 * mean.double())


def test_an_adapter_on_a_base_with_an_adapter_is_ambiguous(tmp_path: Path) -> None:
    _, adapted = write_adapted(tmp_path, own_models=False)
    write_checkpoint(tmp_path / "one", random_tensors(9, SHAPES))
    references = [str(adapted[1].folder), str(tmp_path / "one")]
    base = f"{tmp_path}/base+{adapted[0].folder}"
    with pytest.raises(
        MergekitBayesError, match=r"adapter2 is an adapter, and the base .* has one too.*model\+adapter"
    ):
        merge(recipe(tmp_path, "task_arithmetic", references, base_model=base), tmp_path / "out")


def test_an_adapter_alone_needs_a_base_for_full_weights(tmp_path: Path) -> None:
    _, adapted = write_adapted(tmp_path, own_models=False)
    references = [str(each.folder) for each in adapted]
    with pytest.raises(MergekitBayesError) as caught:
        merge(recipe(tmp_path, "linear", references, base_model=None), tmp_path / "out")
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/adapter{i} is an adapter; expected a base_model to merge it into (space: full)" for i in (1, 2)
    ]


def test_an_adapter_of_an_adapter_is_refused(tmp_path: Path) -> None:
    _, (first, second) = write_adapted(tmp_path, own_models=False)
    with pytest.raises(
        MergekitBayesError, match=r"adapter1 is itself an adapter; expected a full model before the `\+`"
    ):
        open_input(f"{first.folder}+{second.folder}", None, base_dir=tmp_path)


# --- fingerprints ---------------------------------------------------------------------------------------------------


def test_an_adapter_is_compared_with_the_model_it_stands_on(tmp_path: Path) -> None:
    """A source `model+adapter` need not be an adapter of the recipe's base."""
    _, adapted = write_adapted(tmp_path, own_models=True)
    adapted[0].describe(base=tmp_path / "model1")
    adapted[1].describe(base=tmp_path / "base")
    references = [f"{tmp_path}/model{i}+{each.folder}" for i, each in enumerate(adapted, start=1)]
    with pytest.raises(MergekitBayesError) as caught:
        merge(recipe(tmp_path, "posterior", references, precision={"prior": 0.5}), tmp_path / "out")
    (line,) = str(caught.value).splitlines()
    assert "adapter2" in line
    assert "belongs to a base with fingerprint" in line


@pytest.mark.parametrize("method", ["task_arithmetic", "gradient_matching", "posterior"])
def test_a_checkpoint_trained_from_another_base_is_refused_with_both_fingerprints(method: str, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "other", "one", "two")):
        write_checkpoint(tmp_path / name, random_tensors(seed, SHAPES))
    for name, base in (("one", "base"), ("two", "other")):
        precisions = random_precisions(3, SHAPES, above=0.5)
        write_precisions(tmp_path / name, precisions, base=tmp_path / base, prior_precision=0.5, base_model=base)
    before = snapshot(tmp_path)
    references = [str(tmp_path / name) for name in ("one", "two")]
    with pytest.raises(MergekitBayesError) as caught:
        merge(recipe(tmp_path, method, references), tmp_path / "out")
    assert snapshot(tmp_path) == before
    seen, expected = (open_input(str(tmp_path / n), None, base_dir=tmp_path).fingerprint for n in ("other", "base"))
    assert str(caught.value) == (
        f"{tmp_path}/two/precision.safetensors: belongs to a base with fingerprint {seen} (other); "
        f"expected {expected}, that of the base in use"
    )


def test_a_method_without_a_base_does_not_care_which_it_was(tmp_path: Path) -> None:
    for seed, name in enumerate(("other", "one", "two")):
        write_checkpoint(tmp_path / name, random_tensors(seed, SHAPES))
    for name in ("one", "two"):
        write_precisions(tmp_path / name, random_precisions(3, SHAPES), base=tmp_path / "other")
    references = [str(tmp_path / name) for name in ("one", "two")]
    merge(recipe(tmp_path, "hessian_weighted", references, base_model=None), tmp_path / "out")


# --- precisions -----------------------------------------------------------------------------------------------------


def checkpoint_with_sidecar(root: Path, *, to: Path | None = None, shards: int = 1) -> Path:
    folder = write_checkpoint(root / "model", random_tensors(0, SHAPES))
    write_precisions(folder, random_precisions(1, SHAPES), to=to, shards=shards, prior_precision=0.25)
    return folder


@pytest.mark.parametrize("shards", [1, 2])
def test_the_sidecar_beside_a_model_is_found(shards: int, tmp_path: Path) -> None:
    folder = checkpoint_with_sidecar(tmp_path, shards=shards)
    source = open_input(str(folder), None, base_dir=tmp_path)
    assert source.sidecar is not None
    assert source.sidecar.metadata.prior_precision == 0.25
    assert source.places == (folder, source.sidecar.path)


def test_false_ignores_the_sidecar_and_a_number_replaces_it(tmp_path: Path) -> None:
    folder = str(checkpoint_with_sidecar(tmp_path))
    assert open_input(folder, False, base_dir=tmp_path).sidecar is None
    source = open_input(folder, 3.0, base_dir=tmp_path)
    assert (source.sidecar, source.scalar_precision) == (None, 3.0)


@pytest.mark.parametrize(
    "reference", ["elsewhere.safetensors", "{root}/elsewhere.safetensors", "{root}/folder", "folder"]
)
def test_a_sidecar_may_lie_elsewhere_relative_to_the_recipe(reference: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target = tmp_path / ("folder" if "folder" in reference else "elsewhere.safetensors")
    folder = checkpoint_with_sidecar(tmp_path, to=target)
    source = open_input(str(folder), reference.format(root=tmp_path), base_dir=tmp_path)
    assert source.sidecar is not None
    assert source.sidecar.tensors.keys() == tensor_infos(folder).keys()


def test_a_sidecar_that_is_nowhere_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = checkpoint_with_sidecar(tmp_path)
    with pytest.raises(MergekitBayesError, match=r"nowhere/precision\.safetensors"):
        open_input(str(folder), "nowhere/precision.safetensors", base_dir=tmp_path)


def test_models_are_found_from_the_folder_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("base", "one", "two")):
        write_checkpoint(tmp_path / "models" / name, random_tensors(seed, SHAPES))
    text = "merge_method: linear\nmodels:\n- {model: models/one, parameters: {weight: 1}}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    merge(tmp_path / "recipe.yaml", tmp_path / "out")
    assert torch.equal(read_tensors(tmp_path / "out")[NORM], read_tensors(tmp_path / "models" / "one")[NORM])
