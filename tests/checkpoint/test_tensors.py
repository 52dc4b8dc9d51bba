from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mergekit_bayes.checkpoint.tensors import read_tensors, write_tensors
from mergekit_bayes.errors import CheckpointError


def test_tensors_come_back_and_equal_ones_give_equal_bytes(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": whole.t(), "half": whole[1].half(), "n": torch.tensor(3), "none": torch.zeros(0, 2)}
    write_tensors(tmp_path / "one", tensors)
    write_tensors(tmp_path / "two", dict(reversed(tensors.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    for found in (read_tensors(tmp_path / "one"), load_file(tmp_path / "one")):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(CheckpointError):
        read_tensors(tmp_path / "file")
