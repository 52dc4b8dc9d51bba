"""From curvature to the tensors of a sidecar: N, the prior, dtypes, shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_bayes.checkpoint.sidecar import SidecarMetadata, open_sidecar
from mergekit_bayes.checkpoint.tensors import read_tensors, write_tensors
from mergekit_bayes.errors import NonPositivePrecisionError
from mergekit_bayes.estimate import sidecar
from mergekit_bayes.estimate.sidecar import join_groups, precisions, write_group

METADATA: dict[str, Any] = {
    "family": "kronecker",
    "estimator": "kfac",
    "space": "full",
    "mean_fingerprint": "blake2b-16:" + "1" * 32,
    "num_examples": 100,
    "weight_decay": 0.01,
    "prior_precision": 1.0,
}
KRONECKER = SidecarMetadata(**METADATA)
DIAGONAL = SidecarMetadata(**{**METADATA, "family": "diagonal"})
EYE = torch.eye(2)[None]


def found(curvature: dict[str, torch.Tensor], metadata: SidecarMetadata, dtype: torch.dtype = torch.float32) -> Any:
    return precisions(curvature, metadata, units=10, dtype=dtype)


def test_a_diagonal_is_scaled_and_gets_the_prior() -> None:
    assert found({"w": torch.tensor([0.0, 2.0])}, DIAGONAL)["w"].tolist() == [1.0, 21.0]


def test_factors_are_scaled_once_and_get_no_prior() -> None:
    both = found({"w.input_factor": EYE, "w.output_factor": 3 * EYE, "b": torch.ones(2)}, KRONECKER)
    assert torch.equal(both["w.input_factor"], EYE)
    assert torch.equal(both["w.output_factor"], 30 * EYE)
    assert both["b"].tolist() == [11.0, 11.0]
    alone = found({"w.input_factor": EYE}, KRONECKER)
    assert torch.equal(alone["w.input_factor"], 10 * EYE)
    values = torch.ones(1, 2, 2)
    based = found({"w.input_factor": EYE, "w.output_factor": EYE, "w.eigenvalues": values}, KRONECKER)
    assert torch.equal(based["w.eigenvalues"], 10 * values)
    assert torch.equal(based["w.output_factor"], EYE)


def test_a_name_that_ends_like_a_factor_is_none_in_a_diagonal() -> None:
    assert found({"w.input_factor": torch.ones(2)}, DIAGONAL)["w.input_factor"].tolist() == [11.0, 11.0]


def test_bases_keep_their_type() -> None:
    tensors = {
        "w.input_factor": EYE,
        "w.output_factor": EYE,
        "w.eigenvalues": torch.ones(1, 2, 2),
        "v.input_factor": EYE,
    }
    dtypes = {name: tensor.dtype for name, tensor in found(tensors, KRONECKER, torch.bfloat16).items()}
    assert dtypes == {
        "w.input_factor": torch.float32,
        "w.output_factor": torch.float32,
        "w.eigenvalues": torch.bfloat16,
        "v.input_factor": torch.bfloat16,
    }


def test_what_no_precision_is_is_refused() -> None:
    with pytest.raises(NonPositivePrecisionError, match="precision of w: 1 of 2 entries are not positive"):
        found({"w": torch.tensor([-1.0, 1.0])}, DIAGONAL)


def test_a_group_is_written_target_by_target_as_it_is_at_once(tmp_path: Path) -> None:
    values = {"w.eigenvalues": torch.rand(1, 2, 2), "v.input_factor": EYE, "b": torch.rand(3)}
    tensors = {"w.input_factor": EYE, **values, "w.output_factor": EYE}
    for metadata, curvature in ((KRONECKER, tensors), (DIAGONAL, {"w": torch.rand(2, 2), "b": torch.rand(3)})):
        write_group(tmp_path / "group", curvature, metadata, units=10, dtype=torch.bfloat16)
        expected = found(curvature, metadata, torch.bfloat16)
        written = read_tensors(tmp_path / "group")
        assert written.keys() == expected.keys()
        for name, tensor in expected.items():
            assert written[name].dtype == tensor.dtype
            assert torch.equal(written[name], tensor)


def test_groups_become_one_sidecar(tmp_path: Path) -> None:
    write_tensors(tmp_path / "group-0.safetensors", {"b": torch.ones(3), "a": torch.full((2,), 2.0)})
    write_tensors(tmp_path / "group-1.safetensors", {"c": torch.ones(1).bfloat16()})
    names = join_groups(tmp_path, ["group-0.safetensors", "group-1.safetensors"], DIAGONAL)
    assert names == ["precision.safetensors"]
    opened = open_sidecar(tmp_path)
    assert list(opened.tensors) == ["a", "b", "c"]
    assert opened.metadata == DIAGONAL
    assert read_tensors(tmp_path / "precision.safetensors")["a"].tolist() == [2.0, 2.0]


def test_a_large_sidecar_is_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sidecar, "_MAX_SHARD_BYTES", 16)
    monkeypatch.setattr(sidecar, "_BLOCK", 2)
    tensors = {name: torch.rand(3) + 0.1 for name in "abc"}
    write_tensors(tmp_path / "group-0.safetensors", tensors)
    names = join_groups(tmp_path, ["group-0.safetensors"], DIAGONAL)
    assert len(names) == 4
    assert names[-1] == "precision.safetensors.index.json"
    opened = open_sidecar(tmp_path)
    assert opened.path.name == names[-1]
    for name, info in opened.tensors.items():
        assert torch.equal(read_tensors(info.path)[name], tensors[name])
