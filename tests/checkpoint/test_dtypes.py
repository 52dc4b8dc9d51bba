from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_bayes.checkpoint.dtypes import DTYPES, dtype_named, dtype_of, torch_dtype
from mergekit_bayes.checkpoint.header import read_header
from mergekit_bayes.errors import CheckpointError


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_type_is_what_safetensors_writes_and_reads(name, tmp_path):
    tensor = torch.zeros(3, dtype=torch_dtype(name))
    path = tmp_path / "one.safetensors"
    save_file({"x": tensor}, path)
    info = read_header(path).tensors["x"]
    assert info.dtype == name
    assert info.nbytes == 3 * DTYPES[name].itemsize == tensor.nbytes
    assert load_file(path)["x"].dtype == torch_dtype(name)
    assert dtype_of(tensor) == name


def test_only_the_four_ordinary_float_types_are_merged_by_arithmetic():
    assert [name for name in DTYPES if DTYPES[name].floating] == ["F16", "BF16", "F32", "F64"]


@pytest.mark.parametrize(
    ("recipe", "header"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32"), ("float64", "F64")]
)
def test_recipe_names(recipe, header):
    assert dtype_named(recipe) == header


@pytest.mark.parametrize("name", ["bf16", "int8", "float8_e4m3fn", "", "BF16"])
def test_other_recipe_names_are_refused_with_the_choices(name):
    with pytest.raises(CheckpointError, match=r"bfloat16, float16, float32, float64"):
        dtype_named(name)


@pytest.mark.parametrize("name", ["F4", "float32", "bf16"])
def test_unknown_header_names_are_refused(name):
    with pytest.raises(CheckpointError, match=name):
        torch_dtype(name)


def test_types_that_no_file_can_hold_are_refused():
    with pytest.raises(CheckpointError, match=r"torch\.complex128 cannot be stored"):
        dtype_of(torch.zeros(1, dtype=torch.complex128))
