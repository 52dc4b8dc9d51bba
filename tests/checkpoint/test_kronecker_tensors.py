from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_bayes.checkpoint.adapter import open_adapter
from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.header import TensorInfo, read_header
from mergekit_bayes.checkpoint.kronecker_tensors import kronecker_tensors
from mergekit_bayes.checkpoint.sidecar import SidecarMetadata, check_sidecar, open_sidecar, write_sidecar
from mergekit_bayes.errors import (
    CheckpointError,
    NonFiniteError,
    NonPositivePrecisionError,
    NumericalError,
    PlanError,
)

MEAN = "blake2b-16:" + "1" * 32
METADATA: dict[str, Any] = {
    "family": "kronecker",
    "estimator": "kfac",
    "mean_fingerprint": MEAN,
    "prior_precision": 0.5,
}
FULL = SidecarMetadata(**METADATA, space="full")
PRODUCT = SidecarMetadata(**METADATA, space="product")


def semidefinite(size: int, *, terms: int = 1) -> Tensor:
    """Gram matrices of random rows, (terms, size, size)."""
    rows = torch.randn(terms, 2, size, generator=torch.Generator().manual_seed(size))
    return rows.mT @ rows


def factors(weight: str = "w", *, out: int = 3, inward: int = 5, terms: int = 1) -> dict[str, Tensor]:
    return {
        f"{weight}.input_factor": semidefinite(inward, terms=terms),
        f"{weight}.output_factor": semidefinite(out, terms=terms),
    }


def corrected(weight: str = "w") -> dict[str, Tensor]:
    basis = {name: torch.linalg.qr(values).Q for name, values in factors(weight).items()}
    return {**basis, f"{weight}.eigenvalues": torch.rand(1, 3, 5)}


def gram(weight: str = "w", size: int = 5) -> dict[str, Tensor]:
    return {f"{weight}.input_factor": semidefinite(size)}


def test_the_bytes_of_a_small_sidecar(tmp_path: Path) -> None:
    tensors = {"w.input_factor": torch.eye(2)[None], "w.output_factor": torch.tensor([[[4.0]]]), "b": torch.ones(1)}
    path = write_sidecar(tmp_path, tensors, FULL)
    header = json.loads(path.read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    assert json.loads(header.pop("__metadata__")["mergekit_bayes"]) == json.loads(FULL.to_json())
    assert {name: (entry["dtype"], entry["shape"]) for name, entry in header.items()} == {
        "b": ("F32", [1]),
        "w.input_factor": ("F32", [1, 2, 2]),
        "w.output_factor": ("F32", [1, 1, 1]),
    }
    assert FULL.version == 1, "versions that know no factors refuse the family, not the version"


@pytest.mark.parametrize(
    ("tensors", "parts"),
    [(factors(terms=3), (True, True, False)), (corrected(), (True, True, True)), (gram(), (True, False, False))],
)
def test_factors_are_found_again(tmp_path: Path, tensors: dict[str, Tensor], parts: tuple[bool, ...]) -> None:
    sidecar = open_sidecar(write_sidecar(tmp_path, {**tensors, "b": torch.ones(3)}, FULL))
    found = kronecker_tensors(sidecar, "w")
    assert found is not None
    assert tuple(part is not None for part in found) == parts
    assert found.input.name == "w.input_factor"
    assert found.terms == tensors["w.input_factor"].shape[0]
    assert kronecker_tensors(sidecar, "b") is None
    assert kronecker_tensors(sidecar, "x") is None


def test_a_diagonal_sidecar_has_no_factors_whatever_its_tensors_are_called(tmp_path: Path) -> None:
    diagonal = SidecarMetadata(**{**METADATA, "family": "diagonal"}, space="full")
    sidecar = open_sidecar(write_sidecar(tmp_path, {"w.input_factor": torch.ones(1, 2, 2)}, diagonal))
    assert kronecker_tensors(sidecar, "w") is None


def test_factors_of_lora_factors_are_no_family() -> None:
    with pytest.raises(CheckpointError, match="space is factor, expected product or full for the family kronecker"):
        SidecarMetadata(**METADATA, space="factor")


# --- layout


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w.output_factor": semidefinite(3)}, "w: has output_factor but no input_factor"),
        ({**gram(), "w.eigenvalues": torch.ones(1, 3, 5)}, "w: has eigenvalues but no output_factor"),
        ({"w.input_factor": torch.eye(5)}, r"w: input_factor has shape \(5, 5\); expected three sizes"),
        ({"w.input_factor": torch.zeros(0, 5, 5)}, "expected three sizes each, the first the number of terms"),
        ({**gram(), "w.output_factor": semidefinite(3, terms=2)}, "the first the number of terms"),
        ({"w.input_factor": torch.ones(1, 5, 4)}, "expected square factors"),
        ({**factors(), "w.eigenvalues": torch.ones(1, 5, 3)}, r"expected eigenvalues of shape \(terms, out, in\)"),
    ],
)
def test_factors_that_do_not_belong_together_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], message: str
) -> None:
    save_file(tensors, tmp_path / "precision.safetensors", FULL.to_metadata())
    with pytest.raises(CheckpointError, match=rf"precision\.safetensors: .*{message}"):
        open_sidecar(tmp_path)


def test_all_faults_of_all_weights_are_listed(tmp_path: Path) -> None:
    tensors = {"v.output_factor": semidefinite(2), "w.input_factor": torch.eye(5), "x": torch.ones(2).half()}
    save_file(tensors, tmp_path / "precision.safetensors", FULL.to_metadata())
    with pytest.raises(PlanError) as caught:
        open_sidecar(tmp_path)
    assert [type(problem) for problem in caught.value.problems] == [CheckpointError] * 3


# --- values


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"w.input_factor": torch.full((1, 5, 5), torch.nan)}, NonFiniteError, "w.input_factor: 25 of 25 entries"),
        ({"w.input_factor": -torch.eye(5)[None]}, NonPositivePrecisionError, "5 of 5 entries of the diagonal"),
        ({"w.output_factor": torch.ones(1, 3, 3).triu()}, NumericalError, "w.output_factor: entries differ from those"),
        ({"b": torch.zeros(3)}, NonPositivePrecisionError, "precision of b: 3 of 3 entries are not positive"),
        ({"w.input_factor": torch.eye(5)[None].half()}, CheckpointError, "w.input_factor: dtype torch.float16"),
        ({"w": torch.zeros(3, 5)}, NonPositivePrecisionError, "precision of w: 15 of 15"),
    ],
)
def test_what_no_factor_can_be_is_not_written(
    tmp_path: Path, change: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        write_sidecar(tmp_path, {**factors(), **change}, FULL)
    assert list(tmp_path.iterdir()) == []


def test_a_basis_has_signs_but_eigenvalues_have_none(tmp_path: Path) -> None:
    tensors = {**corrected(), "w.input_factor": -torch.eye(5)[None]}
    stored = load_file(write_sidecar(tmp_path, tensors, FULL))
    assert torch.equal(stored["w.input_factor"], tensors["w.input_factor"])
    tensors["w.eigenvalues"][0, 0, 0] = -1.0
    with pytest.raises(NonPositivePrecisionError, match=r"w\.eigenvalues: 1 of 15 eigenvalues are negative"):
        write_sidecar(tmp_path, tensors, FULL)


def test_rounding_of_a_symmetric_factor_is_forgiven(tmp_path: Path) -> None:
    noisy = semidefinite(5)
    noisy[0, 0, 1] *= 1 + 1e-7
    write_sidecar(tmp_path, {**factors(), "w.input_factor": noisy}, FULL)


# --- does it belong?


def infos(folder: Path, tensors: dict[str, Tensor]) -> dict[str, TensorInfo]:
    save_file(tensors, folder / "model.safetensors")
    return dict(read_header(folder / "model.safetensors").tensors)


def problems(folder: Path, tensors: dict[str, Tensor], means: dict[str, TensorInfo]) -> list[str]:
    metadata = SidecarMetadata(**{**METADATA, "mean_fingerprint": fingerprint(means)}, space="full")
    sidecar = open_sidecar(write_sidecar(folder, tensors, metadata))
    found = check_sidecar(
        sidecar, mean_tensors=means, mean_fingerprint=metadata.mean_fingerprint, base_fingerprint=None
    )
    return [str(problem).split(": ", 1)[1] for problem in found]


@pytest.mark.parametrize("stored", [(3, 5), (5, 3)])
def test_factors_fit_a_weight_however_it_is_stored(tmp_path: Path, stored: tuple[int, int]) -> None:
    means = infos(tmp_path, {"w": torch.zeros(stored), "b": torch.zeros(3)})
    assert problems(tmp_path, {**factors(), "b": torch.ones(3)}, means) == []
    assert problems(tmp_path, corrected(), means) == []
    assert problems(tmp_path, gram(), means) == []


def test_factors_of_other_sizes_or_other_weights_are_named(tmp_path: Path) -> None:
    means = infos(tmp_path, {"w": torch.zeros(3, 5), "b": torch.zeros(3)})
    (seen,) = problems(tmp_path, factors(out=5, inward=5), means)
    assert seen.startswith("w: input_factor has shape (1, 5, 5), output_factor has shape (1, 5, 5); expected the sides")
    (seen,) = problems(tmp_path, factors("v"), means)
    assert seen == "holds precisions for v; expected only tensors of the checkpoint"
    (seen,) = problems(tmp_path, gram("b", 3), means)
    assert "expected the sides of a weight (3,)" in seen
    (seen,) = problems(tmp_path, {**factors(), "w": torch.ones(5, 3)}, means)
    assert seen == "precision of w has shape (5, 3); expected (3, 5), as in the checkpoint"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of two modules, 5 to 3 and an embedding of 7 words, and a head stored whole."""
    save_file(
        {
            "base_model.model.h.q.lora_A.weight": torch.ones(2, 5),
            "base_model.model.h.q.lora_B.weight": torch.ones(3, 2),
            "base_model.model.e.lora_embedding_A": torch.ones(2, 7),
            "base_model.model.e.lora_embedding_B": torch.ones(4, 2),
            "base_model.model.score.weight": torch.ones(2, 3),
        },
        tmp_path / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "e"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


def product_problems(folder: Path, tensors: dict[str, Tensor], **changes: object) -> list[str]:
    opened = open_adapter(folder)
    described = fingerprint(opened.tensors)
    metadata = SidecarMetadata(**{**METADATA, "space": "product", "mean_fingerprint": described, **changes})
    sidecar = open_sidecar(write_sidecar(folder, tensors, metadata))
    found = check_sidecar(
        sidecar, mean_tensors=opened.tensors, mean_fingerprint=described, base_fingerprint=None, adapter=opened
    )
    return [str(problem).split(": ", 1)[1] for problem in found]


def test_product_space_describes_updates_by_the_names_of_the_base(adapter: Path) -> None:
    whole = {"h.q.weight": torch.ones(3, 5), "e.weight": torch.ones(7, 4), "score.weight": torch.ones(2, 3)}
    assert product_problems(adapter, whole, family="diagonal", prior_precision=None) == []
    assert product_problems(adapter, {**factors("h.q.weight"), "score.weight": torch.ones(2, 3)}) == []
    assert product_problems(adapter, corrected("h.q.weight")) == []


def test_product_space_knows_no_transposed_weights_and_no_lora_factors(adapter: Path) -> None:
    (seen,) = product_problems(adapter, factors("h.q.weight", out=5, inward=3))
    assert "expected the sides of a weight (3, 5), which is (out, in)" in seen
    (seen,) = product_problems(adapter, {"h.q.weight": torch.ones(5, 3)}, family="diagonal")
    assert seen == "precision of h.q.weight has shape (5, 3); expected (3, 5), as in the updates of the adapter"
    (seen,) = product_problems(adapter, {"base_model.model.h.q.lora_A.weight": torch.ones(2, 5)}, family="diagonal")
    assert seen.endswith("expected only updates of the adapter")
    (seen,) = product_problems(adapter, factors("h.q.weight"), prior_precision=None)
    assert seen.startswith(
        "holds no precision for e.weight, score.weight; expected one for every update of the adapter"
    )


def test_product_space_beside_a_full_model_is_refused(tmp_path: Path) -> None:
    means = infos(tmp_path, {"w": torch.zeros(3, 5)})
    sidecar = open_sidecar(write_sidecar(tmp_path, factors(), PRODUCT))
    (problem,) = check_sidecar(sidecar, mean_tensors=means, mean_fingerprint=MEAN, base_fingerprint=None)
    assert "describes the updates of an adapter (space product); expected the adapter it belongs to" in str(problem)
