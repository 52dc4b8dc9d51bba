"""The sidecar of what was trained, and merges of folders as training leaves them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from mergekit_bayes.checkpoint.adapter import open_adapter
from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.index import open_checkpoint
from mergekit_bayes.checkpoint.sidecar import open_sidecar
from mergekit_bayes.errors import (
    MergekitBayesError,
    NonPositivePrecisionError,
    PlanError,
    SidecarMismatchError,
)
from mergekit_bayes.merge.run import merge
from mergekit_bayes.model import LoadedModel, save_trained, write_precision
from mergekit_bayes.recipe.adapter import AdapterSpec
from tests.model.builders import LABELS, load, logits, minilm, perturb, precisions, trained
from tests.model.conftest import Bases

Experts = Callable[..., list[Path]]


@pytest.fixture
def experts(tmp_path: Path) -> Experts:
    """`experts(load, ...)`: two folders trained from one base, with sidecars."""

    def two(build: Callable[[], LoadedModel]) -> list[Path]:
        return [trained(tmp_path / f"expert{seed}", build(), seed=seed) for seed in (1, 2)]

    return two


def recipe(base: Path, sources: list[Path], **extra: Any) -> dict[str, Any]:
    models = [{"model": str(source), "parameters": {"weight": 0.5}} for source in sources]
    return {"merge_method": "gradient_matching", "base_model": str(base), "models": models, **extra}


def test_metadata_of_an_adapter(base: Bases, tmp_path: Path) -> None:
    loaded = load(base("llama"), AdapterSpec(r=4, lora_alpha=8))
    folder = trained(tmp_path / "out", loaded, seed=1)
    sidecar = open_sidecar(folder)
    adapter = open_adapter(folder)
    assert sidecar.path == folder / "precision.safetensors"
    assert sidecar.tensors.keys() == adapter.tensors.keys()
    found = sidecar.metadata
    assert (found.space, found.adapter_scaling, found.loss_unit, found.batch_size) == ("factor", 2.0, "token", 4)
    assert (found.base_model, found.base_fingerprint) == (loaded.base.path, loaded.base.fingerprint)
    assert found.mean_fingerprint == fingerprint(adapter.tensors)
    assert (found.estimator, found.num_examples, found.prior_precision, found.debiased) == ("ivon", 100, 1.0, True)


def test_metadata_of_a_model(base: Bases, tmp_path: Path) -> None:
    folder = trained(tmp_path / "out", load(base("llama_tied")), seed=1)
    sidecar = open_sidecar(folder)
    assert sidecar.tensors.keys() == open_checkpoint(folder).tensors.keys()
    assert (sidecar.metadata.space, sidecar.metadata.adapter_scaling) == ("full", None)


def test_several_scalings_are_none(base: Bases, tmp_path: Path) -> None:
    folder = trained(tmp_path / "out", load(base("llama"), AdapterSpec(alpha_pattern={"q_proj": 3})), seed=1)
    assert open_sidecar(folder).metadata.adapter_scaling is None


def test_precisions_in_bfloat16(base: Bases, tmp_path: Path) -> None:
    loaded = load(base("llama"), AdapterSpec())
    save_trained(loaded.model, None, tmp_path, base=loaded.base)
    write_precision(tmp_path, precisions(loaded.model, seed=1), base=loaded.base, loss_unit="token", dtype="bfloat16")
    assert {info.dtype for info in open_sidecar(tmp_path).tensors.values()} == {"BF16"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda p: p.update({"extra": torch.ones(2)}), SidecarMismatchError, "holds precisions for extra"),
        (lambda p: p.update({next(iter(p)): torch.ones(2, 2)}), SidecarMismatchError, r"has shape \(2, 2\); expected"),
        (lambda p: p[next(iter(p))].fill_(-1.0), NonPositivePrecisionError, "entries are not positive"),
    ],
)
def test_precisions_that_do_not_fit(
    base: Bases, tmp_path: Path, change: Callable[[Any], None], error: type[Exception], message: str
) -> None:
    loaded = load(base("llama"), AdapterSpec())
    save_trained(loaded.model, None, tmp_path, base=loaded.base)
    exported = precisions(loaded.model, seed=1)
    change(exported.precisions)
    with pytest.raises(error, match=message):
        write_precision(tmp_path, exported, base=loaded.base, loss_unit="token")


def test_a_precision_for_every_tensor_unless_the_prior_is_a_number(base: Bases, tmp_path: Path) -> None:
    loaded = load(base("llama"), AdapterSpec())
    save_trained(loaded.model, None, tmp_path, base=loaded.base)
    exported = precisions(loaded.model, seed=1)
    exported.precisions.popitem()
    without = SimpleNamespace(precisions=exported.precisions, metadata={**exported.metadata, "prior_precision": None})
    with pytest.raises(SidecarMismatchError, match="holds no precision for"):
        write_precision(tmp_path, without, base=loaded.base, loss_unit="token")
    write_precision(tmp_path, exported, base=loaded.base, loss_unit="token")


# --- merges of what was written, as it stands


def test_adapters_merge_in_product_space(base: Bases, tmp_path: Path, experts: Experts) -> None:
    folder = base("llama")
    sources = experts(lambda: load(folder, AdapterSpec()))
    extra = {"precision": {"prior": 2.0}}
    merge(recipe(folder, sources, space="product", **extra), tmp_path / "adapter")
    merge(recipe(folder, sources, space="full", out_dtype="float32", **extra), tmp_path / "full")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    as_adapter = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    as_model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    assert torch.allclose(logits(as_adapter.eval()), logits(as_model.eval()), atol=1e-3)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"


def test_adapters_of_codes_merge_in_factor_space(base: Bases, tmp_path: Path, experts: Experts) -> None:
    """They share the start of A, and the prior is the one that their sidecars record."""
    folder = base("llama", dtype="bfloat16")
    sources = experts(lambda: load(folder, AdapterSpec(), load_in_4bit=True))
    merge(recipe(folder, sources, space="factor"), tmp_path / "out")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    means = [load_file(source / "adapter_model.safetensors")[name].double() for source in sources]
    weights = [load_file(source / "precision.safetensors")[name].double() for source in sources]
    merged = load_file(tmp_path / "out" / "adapter_model.safetensors")[name]
    # A has no base to subtract: its prior is centred on zero
    total = 1.0 + sum(0.5 * (weight - 1.0) for weight in weights)
    expected = sum(0.5 * weight * mean for weight, mean in zip(weights, means, strict=True)) / total
    assert torch.allclose(merged[: expected.shape[0]].double(), expected, atol=1e-6)


def test_models_merge(base: Bases, tmp_path: Path, experts: Experts) -> None:
    folder = base("llama_tied")
    sources = experts(lambda: load(folder))
    merge(recipe(folder, sources), tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    start = load_file(folder / "model.safetensors")[name].double()
    moves = [load_file(source / "model.safetensors")[name].double() - start for source in sources]
    weights = [load_file(source / "precision.safetensors")[name].double() for source in sources]
    total = 1.0 + sum(0.5 * (weight - 1.0) for weight in weights)
    expected = start + sum(0.5 * weight * move for weight, move in zip(weights, moves, strict=True)) / total
    assert torch.allclose(load_file(tmp_path / "out" / "model.safetensors")[name].double(), expected, atol=1e-6)


@pytest.mark.parametrize("space", ["product", "full"])
def test_adapters_of_a_classifier_merge_with_its_head(
    base: Bases, tmp_path: Path, experts: Experts, space: str
) -> None:
    folder = base("bert")
    sources = experts(lambda: load(folder, AdapterSpec(target_modules=("query", "value")), labels=LABELS))
    merge(recipe(folder, sources, space=space, precision={"prior": 2.0}), tmp_path / "out")
    if space == "full":
        model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    else:
        plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        model = peft.PeftModel.from_pretrained(plain, tmp_path / "out")
    assert logits(model.eval()).isfinite().all()


def test_new_heads_merge_by_methods_that_need_no_base(tmp_path: Path, experts: Experts) -> None:
    """Of a real encoder, which has no head; both started from one, so that their average is one."""
    sources = experts(lambda: load(minilm(), AdapterSpec(target_modules=("query", "value")), labels=LABELS))
    merge({**recipe(minilm(), sources), "merge_method": "linear"}, tmp_path / "out")
    heads = [load_file(source / "adapter_model.safetensors") for source in (*sources, tmp_path / "out")]
    first, second, merged = (head["base_model.model.classifier.weight"] for head in heads)
    assert torch.allclose(merged, (first + second) / 2, atol=1e-7)


def test_another_base_is_refused_with_and_without_a_sidecar(base: Bases, tmp_path: Path) -> None:
    folder = base("llama")
    other = base("llama", seed=5)
    source = trained(tmp_path / "expert", load(folder, AdapterSpec()), seed=1)
    linear = {**recipe(other, [source]), "merge_method": "linear"}
    with pytest.raises(MergekitBayesError, match="belongs to a base with fingerprint"):
        merge(linear, tmp_path / "out")
    (source / "precision.safetensors").unlink()
    with pytest.raises(MergekitBayesError, match="belongs to a base with fingerprint"):
        merge(linear, tmp_path / "out")


def test_weights_that_were_changed_since_are_refused(base: Bases, tmp_path: Path) -> None:
    loaded = load(base("llama"), AdapterSpec())
    source = trained(tmp_path / "expert", loaded, seed=1)
    sidecar = shutil.copy(source / "precision.safetensors", tmp_path)
    perturb(loaded.model, seed=2)
    save_trained(loaded.model, None, tmp_path / "further", base=loaded.base)
    shutil.copy(sidecar, tmp_path / "further")
    with pytest.raises((SidecarMismatchError, PlanError), match="were they trained further or replaced"):
        merge(recipe(base("llama"), [tmp_path / "further"], precision={"prior": 2.0}), tmp_path / "out")
