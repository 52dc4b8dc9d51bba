"""Methods on task vectors from recipe to file: as adapters, as checkpoints, with options of single sources."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_bayes.merge.registry import get_method
from mergekit_bayes.merge.run import MergeResult, merge
from mergekit_bayes.posterior import Isotropic
from tests.merge.adapter_problem import SHAPES, Make, Source, assert_close, merged_update, write_base, write_sources
from tests.merge.builders import read_tensors

SPECTRAL = ("iso_c", "iso_cts", "knots", "tsv_m")
METHODS = (*SPECTRAL, "ties")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """Adapters of rank 2 and 1, the second of which leaves one layer alone."""
    root = tmp_path_factory.mktemp("sources")
    some = tuple(SHAPES)[:2]
    return write_sources(root, Make(rank=2, scaling=0.5, facts=None), Make(rank=1, modules=some, facts=None))


def run(method: str, sources: list[Source], out: Path, *, threads: int = 1, **recipe: Any) -> MergeResult:
    models = [
        {"model": str(source.folder), "parameters": {"weight": weight, **recipe.pop(f"own{place}", {})}}
        for place, (source, weight) in enumerate(zip(sources, (1.0, 0.75), strict=True))
    ]
    base = write_base(sources[0].folder.parent / "base")
    content = {"merge_method": method, "base_model": str(base), "models": models, "dtype": "float64", **recipe}
    return merge(content, out, threads=threads)


def by_hand(method: str, sources: list[Source], module: str, **options: Any) -> torch.Tensor:
    """The kernel on the updates of one layer, a source without the layer having none."""
    base = Isotropic(torch.zeros(SHAPES[module], dtype=torch.float64), 1.0)
    means = [s.update(module) if module in s.factors else base.mean for s in sources]
    weights = torch.tensor([1.0, 0.75], dtype=torch.float64)
    mean: torch.Tensor = (
        get_method(method).kernel(base, [base.with_mean(m) for m in means], weights, **options).posterior.mean
    )
    return mean


@pytest.mark.parametrize("method", METHODS)
def test_adapters_merge_to_the_same_weights_in_every_space(method: str, sources: list[Source], tmp_path: Path) -> None:
    rank = {"output": {"rank": 5}} if method == "ties" else {}
    run(method, sources, tmp_path / "adapter", space="product", **rank)
    run(method, sources, tmp_path / "checkpoint", space="full")
    base, merged = (read_tensors(folder) for folder in (sources[0].folder.parent / "base", tmp_path / "checkpoint"))
    for module in SHAPES:
        wanted = by_hand(method, sources, module)
        assert_close(merged_update(tmp_path / "adapter", module), wanted)
        name = f"{module}.weight"
        assert_close(merged[name].double() - base[name].double(), wanted, 1e-9)


@pytest.mark.parametrize("method", SPECTRAL)
def test_an_adapter_of_the_ranks_together_is_enough(method: str, sources: list[Source], tmp_path: Path) -> None:
    report = run(method, sources, tmp_path / "out", space="product").report
    assert set(report["layers"]) == set(SHAPES)
    assert all(measured["lost_energy"] < 1e-12 for measured in report["layers"].values())
    assert not (tmp_path / "out" / "precision.safetensors").exists()


@pytest.mark.parametrize("method", ["knots", "ties"])
def test_a_source_has_a_density_of_its_own(method: str, sources: list[Source], tmp_path: Path) -> None:
    run(method, sources, tmp_path / "out", space="full", parameters={"density": 0.5}, own1={"density": 0.25})
    base, merged = (read_tensors(folder) for folder in (sources[0].folder.parent / "base", tmp_path / "out"))
    for module in SHAPES:
        name, wanted = f"{module}.weight", by_hand(method, sources, module, density=(0.5, 0.25))
        assert_close(merged[name].double() - base[name].double(), wanted, 1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("space", ["product", "full"])
def test_threads_do_not_change_a_byte(method: str, space: str, sources: list[Source], tmp_path: Path) -> None:
    name = "adapter_model" if space == "product" else "model"
    first, second = (run(method, sources, tmp_path / f"{n}", threads=n, space=space).folder for n in (1, 3))
    assert [p.read_bytes() for p in sorted(first.glob(f"{name}*"))] == [
        p.read_bytes() for p in sorted(second.glob(f"{name}*"))
    ]


@pytest.mark.parametrize("method", METHODS)
def test_float32_follows_float64(method: str, sources: list[Source], tmp_path: Path) -> None:
    for dtype in ("float32", "float64"):
        run(method, sources, tmp_path / dtype, space="full", dtype=dtype)
    base, single, double = (
        read_tensors(folder)
        for folder in (sources[0].folder.parent / "base", tmp_path / "float32", tmp_path / "float64")
    )
    for module in SHAPES:
        name = f"{module}.weight"
        assert_close(single[name].double() - base[name].double(), double[name].double() - base[name].double(), 1e-4)
