from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.header import read_header
from mergekit_bayes.errors import CheckpointError


def print_of(folder: Path, tensors: dict[str, torch.Tensor], *files: list[str]) -> str:
    """Fingerprint of tensors saved in one file, or in one file for each list of names."""
    folder.mkdir(exist_ok=True)
    found = {}
    for number, names in enumerate(files or [list(tensors)]):
        path = folder / f"{number}.safetensors"
        save_file({name: tensors[name] for name in names}, path)
        found.update(read_header(path).tensors)
    return fingerprint(found)


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "big": torch.randn(100, 70, generator=generator),
        "small": torch.randn(7, generator=generator).bfloat16(),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 5),
        "exactly 4096 bytes": torch.randn(1024, generator=generator),
        "é\n": torch.arange(3),
    }


def test_form(tmp_path, tensors):
    assert re.fullmatch(r"blake2b-16:[0-9a-f]{32}", print_of(tmp_path, tensors))
    assert re.fullmatch(r"blake2b-16:[0-9a-f]{32}", fingerprint({}))


def test_value_is_pinned(tmp_path):
    # a changed algorithm would make every published sidecar a stranger to its checkpoint
    fixed = {"b": torch.arange(5000, dtype=torch.float32), "a": torch.ones(3, dtype=torch.bfloat16)}
    assert print_of(tmp_path, fixed) == "blake2b-16:7f95eeaad7f18b9a479ae85744d86c2b"


def test_spread_over_files_and_order_do_not_matter(tmp_path, tensors):
    whole = print_of(tmp_path / "a", tensors)
    names = sorted(tensors)
    assert print_of(tmp_path / "b", tensors, names[:2], names[2:]) == whole
    assert print_of(tmp_path / "c", tensors, *[[name] for name in names]) == whole
    assert print_of(tmp_path / "d", dict(reversed(tensors.items()))) == whole
    infos = read_header(tmp_path / "a" / "0.safetensors").tensors
    assert fingerprint(dict(reversed(infos.items()))) == whole


def changed(tensors, name, **changes):
    result = dict(tensors)
    for new, value in changes.items():
        result[new] = value
    del result[name]
    return result


@pytest.mark.parametrize("name", ["big", "small", "scalar", "exactly 4096 bytes", "é\n"])
@pytest.mark.parametrize("where", [0, -1])
def test_first_and_last_values_matter(tmp_path, tensors, name, where):
    other = {key: tensor.clone() for key, tensor in tensors.items()}
    other[name].view(-1)[where] += 1
    assert print_of(tmp_path / "a", tensors) != print_of(tmp_path / "b", other)


def test_names_types_shapes_and_membership_matter(tmp_path, tensors):
    big = tensors["big"]
    variants = [
        tensors,
        changed(tensors, "big", bog=big),
        {**tensors, "big": big.reshape(70, 100)},
        {**tensors, "big": big.view(torch.int32)},
        {**tensors, "empty": torch.zeros(5, 0)},
        changed(tensors, "empty"),
        {**tensors, "more": torch.zeros(0)},
        {**tensors, "scalar": torch.tensor([3.0])},
    ]
    prints = [print_of(tmp_path / str(number), variant) for number, variant in enumerate(variants)]
    assert len(set(prints)) == len(prints)


def test_moving_bytes_between_tensors_matters(tmp_path):
    first = {"a": torch.tensor([1, 2], dtype=torch.uint8), "b": torch.tensor([3], dtype=torch.uint8)}
    second = {"a": torch.tensor([1], dtype=torch.uint8), "b": torch.tensor([2, 3], dtype=torch.uint8)}
    assert print_of(tmp_path / "a", first) != print_of(tmp_path / "b", second)


def test_a_small_step_of_training_shows(tmp_path, tensors):
    generator = torch.Generator().manual_seed(1)
    moved = dict(tensors, big=tensors["big"] + 1e-5 * torch.randn(100, 70, generator=generator))
    assert print_of(tmp_path / "a", tensors) != print_of(tmp_path / "b", moved)


def test_little_is_read(tmp_path, monkeypatch):
    save_file({str(n): torch.zeros(1 << 20) for n in range(3)}, tmp_path / "x.safetensors")
    infos = read_header(tmp_path / "x.safetensors").tensors
    read = []
    real = __import__("os").pread
    monkeypatch.setattr("os.pread", lambda fd, n, at: read.append(n) or real(fd, n, at))
    fingerprint(infos)
    assert sum(read) == 3 * 4096


def test_a_file_that_shrank_is_refused(tmp_path, tensors):
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    infos = read_header(path).tensors
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 100)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: changed while reading"):
        fingerprint(infos)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"x\.safetensors: cannot be opened"):
        fingerprint(infos)


def test_torch_is_not_imported():
    code = (
        "import sys, mergekit_bayes.checkpoint.fingerprint, mergekit_bayes.checkpoint.sidecar, "
        "mergekit_bayes.checkpoint.index, mergekit_bayes.checkpoint.adapter, mergekit_bayes.checkpoint.orientation, "
        "mergekit_bayes.checkpoint.reference, mergekit_bayes.checkpoint.reader; "
        "heavy = {'torch', 'numpy', 'transformers', 'peft', 'huggingface_hub', 'safetensors'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
