"""From a precision recipe to a merge that uses what it left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergekit_bayes.merge.run import merge
from tests.estimate.runs import recipe, run, sidecar_of
from tests.tiny_models import save_tiny_adapter, save_tiny_model


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two adapters of one base."""
    folder = tmp_path_factory.mktemp("merging")
    return [save_tiny_adapter(llama, folder / f"adapter{seed}", seed=seed) for seed in (1, 2)]


def with_precision(llama: Path, adapters: list[Path], folder: Path, **keys: Any) -> list[dict[str, Any]]:
    """The sources of a merge, each with a sidecar that a pass estimated."""
    sources = []
    for number, adapter in enumerate(adapters):
        run(recipe(llama, adapter, seed=number, prior={"weight_decay": 1e-2}, **keys), folder / f"precision{number}")
        precision = str(folder / f"precision{number}")
        sources.append({"model": str(adapter), "precision": precision, "parameters": {"weight": 1.0}})
    return sources


def merged(llama: Path, method: str, sources: list[dict[str, Any]], out: Path, **keys: Any) -> dict[str, Tensor]:
    content = {"merge_method": method, "base_model": str(llama), "models": sources, "space": "full", **keys}
    merge(content, out)
    return load_file(out / "model.safetensors")


WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def update(adapter: Path) -> Tensor:
    """The update of one layer of a tiny adapter, in float64."""
    factors = load_file(adapter / "adapter_model.safetensors")
    names = [f"base_model.model.{WEIGHT.removesuffix('.weight')}.lora_{side}.weight" for side in "BA"]
    return 2.0 * factors[names[0]].double() @ factors[names[1]].double()


@pytest.mark.parametrize("estimator", ["fisher", "ggn"])
def test_a_diagonal_in_product_space_decides_a_merge(
    llama: Path, adapters: list[Path], tmp_path: Path, estimator: str
) -> None:
    sources = with_precision(llama, adapters, tmp_path, estimator=estimator, space="product", training_units=50)
    found = merged(llama, "gradient_matching", sources, tmp_path / "out")
    prior = 50 * 1e-2
    precisions = [sidecar_of(Path(source["precision"]))[WEIGHT].double() for source in sources]
    total = sum(precision - prior for precision in precisions) + prior
    moved = sum(p * update(adapter) for p, adapter in zip(precisions, adapters, strict=True)) / total
    base = load_file(llama / "model.safetensors")[WEIGHT].double()
    torch.testing.assert_close(found[WEIGHT].double(), base + moved, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("estimator", ["kfac", "gram", {"name": "kfac", "eigenvalues": True}])
def test_factors_decide_a_merge(llama: Path, adapters: list[Path], tmp_path: Path, estimator: Any) -> None:
    sources = with_precision(llama, adapters, tmp_path, estimator=estimator, training_units=50)
    method = "gram" if estimator == "gram" else "kronecker"
    found = merged(llama, method, sources, tmp_path / "out", parameters={"shrinkage": 0.0})
    prior = 50 * 1e-2
    curvatures = [dense(sidecar_of(Path(source["precision"]))) for source in sources]
    identity = prior * torch.eye(len(curvatures[0]), dtype=torch.float64)
    moved = sum(
        (curvature + identity) @ update(adapter).reshape(-1)
        for curvature, adapter in zip(curvatures, adapters, strict=True)
    )
    expected = torch.linalg.solve(sum(curvatures) + identity, moved)
    base = load_file(llama / "model.safetensors")[WEIGHT].double()
    difference = found[WEIGHT].double() - base - expected.reshape(base.shape)
    assert float(difference.norm() / expected.norm()) < 1e-3


def dense(tensors: dict[str, Tensor]) -> Tensor:
    """The curvature of one layer as a matrix over the entries of W, row by row."""
    inward = tensors[f"{WEIGHT}.input_factor"][0].double()
    eigenvalues = tensors.get(f"{WEIGHT}.eigenvalues")
    if f"{WEIGHT}.output_factor" not in tensors:
        return torch.kron(torch.eye(16, dtype=torch.float64), inward)
    outward = tensors[f"{WEIGHT}.output_factor"][0].double()
    if eigenvalues is None:
        return torch.kron(outward, inward)
    basis = torch.kron(outward, inward)
    return basis @ torch.diag(eigenvalues[0].double().reshape(-1)) @ basis.T


def test_the_precisions_of_full_models_decide_a_merge(llama: Path, tmp_path: Path) -> None:
    from tests.model.builders import with_tokenizer

    sources = []
    for seed in (1, 2):
        plain = save_tiny_model("llama", tmp_path / f"plain{seed}", seed=seed, drift=0.03)
        model = with_tokenizer(plain, tmp_path / f"model{seed}", pad=True)
        run(recipe(model, prior={"weight_decay": 1e-3}, training_units=100), None)  # type: ignore[arg-type]
        sources.append({"model": str(model), "parameters": {"weight": 0.5}})
    found = merged(llama, "gradient_matching", sources, tmp_path / "out")
    base = load_file(llama / "model.safetensors")
    for name, start in base.items():
        means = [load_file(Path(source["model"]) / "model.safetensors")[name].double() for source in sources]
        precisions = [sidecar_of(Path(source["model"]))[name].double() for source in sources]
        total = 0.1 + sum(0.5 * (precision - 0.1) for precision in precisions)
        moved = sum(0.5 * p * (m - start.double()) for p, m in zip(precisions, means, strict=True)) / total
        torch.testing.assert_close(found[name].double(), start.double() + moved, rtol=1e-5, atol=1e-7)
