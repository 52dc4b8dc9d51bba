"""Recipes written for mergekit 0.1.5 give the weights that mergekit gives."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mergekit_bayes import merge
from tests.parity.cases import CASES, Case
from tests.parity.compare import rounding_excess, unfused_experts
from tests.parity.inputs import SOURCES, build_inputs

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def inputs_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parity")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_recipe_gives_the_weights_of_mergekit(
    case: Case, inputs_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = build_inputs(case, inputs_root)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(case.recipe)
    monkeypatch.chdir(inputs)
    merge(recipe, tmp_path / "merged")

    ours, theirs = _tensors(tmp_path / "merged"), _golden(case)
    known = {name: _tensors(inputs / name) for name in SOURCES if re.search(rf"\b{name}\b", case.recipe)}
    assert theirs.keys() <= ours.keys()
    unexplained = [name for name in ours.keys() - theirs.keys() if not any(part in name for part in case.dropped)]
    assert unexplained == []
    for name, tensor in theirs.items():
        operands = {source: tensors[name] for source, tensors in known.items()}
        ordered = ~_at_a_cut(case, operands)
        excess = rounding_excess(
            ours[name][ordered],
            tensor[ordered],
            operands=[operand[ordered] for operand in operands.values()],
            arithmetic=_arithmetic(case),
        )
        assert excess <= 1, f"{name}: {excess:.2f} times what rounding explains"


@pytest.mark.parametrize("case", [case for case in CASES if case.dropped], ids=lambda case: case.name)
def test_what_mergekit_drops_is_still_dropped(case: Case) -> None:
    """The exclusions above go when mergekit no longer needs them."""
    assert not any(part in name for name in _golden(case) for part in case.dropped)


@pytest.mark.slow
def test_committed_outputs_are_those_of_mergekit(tmp_path: Path) -> None:
    python = _python_with_mergekit()
    if python is None:
        pytest.skip("no mergekit 0.1.5: name its interpreter in MERGEKIT_PYTHON, or pip install '.[peers]'")
    command = [python, "-m", "tests.parity.regenerate", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(case.golden.name for case in CASES)
    for case in CASES:
        fresh, committed = load_file(tmp_path / case.golden.name), load_file(case.golden)
        assert fresh.keys() == committed.keys()
        for name, tensor in committed.items():
            excess = rounding_excess(fresh[name], tensor, operands=[tensor], arithmetic=tensor.dtype)
            assert excess <= 1, f"{case.name}: {name}"


def test_every_committed_output_belongs_to_a_case() -> None:
    folder = CASES[0].golden.parent
    assert sorted(folder.iterdir()) == sorted(case.golden for case in CASES)


def _at_a_cut(case: Case, operands: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Entries that are just as large as the smallest one that some source keeps, where others are too."""
    found = torch.zeros_like(operands["base"] if case.cuts else next(iter(operands.values())), dtype=torch.bool)
    for source, density in case.cuts:
        magnitudes = (operands[source].float() - operands["base"].float()).abs()
        kept = max(1, int(density * magnitudes.numel()))
        cut = magnitudes.flatten().sort(descending=True).values[kept - 1]
        equal = magnitudes == cut
        if int((magnitudes >= cut).sum()) > kept:
            found |= equal
    assert float(found.float().mean()) < 0.5, "something is left to compare"
    return found


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    shards = sorted(folder.glob("model*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def _golden(case: Case) -> dict[str, torch.Tensor]:
    tensors = load_file(case.golden)
    return unfused_experts(tensors) if case.architecture == "mixtral" else tensors


def _arithmetic(case: Case) -> torch.dtype:
    """The dtype mergekit computes in: at least float32 for linear, that of its inputs for task arithmetic."""
    recipe: dict[str, Any] = yaml.safe_load(case.recipe)
    given: torch.dtype = getattr(torch, recipe.get("dtype", case.dtype))
    return torch.float32 if recipe["merge_method"] == "linear" and given.itemsize < 4 else given


def _python_with_mergekit() -> str | None:
    if "MERGEKIT_PYTHON" in os.environ:
        return os.environ["MERGEKIT_PYTHON"]
    try:
        return sys.executable if version("mergekit") == "0.1.5" else None
    except PackageNotFoundError:
        return None
