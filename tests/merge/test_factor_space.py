"""Adapters merged factor by factor: A with A, B with B, against float64 oracles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.merge.adapter_problem import SHAPES, Make, Source, assert_close, merge_sources, merged_update, write_sources
from tests.merge.builders import factor_names, read_precisions, read_tensors, write_adapter
from tests.merge.truth import merge_tensor

PRECISION_METHODS = ("gradient_matching", "posterior", "hessian_weighted")
PRIOR_METHODS = ("gradient_matching", "posterior")
SCALAR_METHODS = ("linear", "task_arithmetic")


def factor_truth(
    method: str,
    sources: Sequence[Source],
    weights: Sequence[float],
    module: str,
    *,
    prior: float,
    shares: Sequence[float],
    reference: float,
) -> list[tuple[Tensor, Tensor]]:
    """Mean and precision of A and of B, B at the reference scaling, each source's prior exchanged for the merge's."""
    merged = []
    for which in (0, 1):
        posteriors = []
        for source, share in zip(sources, shares, strict=True):
            ratio = source.scaling / reference if which else 1.0
            mean, precision = source.factors[module][which].double(), source.precisions[module][which].double()
            posteriors.append((mean * ratio, prior + (precision - share) / ratio**2))
        zero = torch.zeros_like(posteriors[0][0])
        result = merge_tensor(method, (zero, prior), posteriors, weights)
        merged.append((result.mean, result.precision))
    return merged


@pytest.mark.parametrize("scalings", [(1.0, 1.0), (0.5, 2.0), (3.0, -1.5)])
@pytest.mark.parametrize("method", PRECISION_METHODS)
def test_factors_are_merged_each_on_its_own(method: str, scalings: Sequence[float], tmp_path: Path) -> None:
    facts = ({"prior_precision": 0.25}, {"prior_precision": 0.5})
    makes = [Make(scaling=s, facts=f) for s, f in zip(scalings, facts, strict=True)]
    sources, weights = write_sources(tmp_path, *makes), (0.7, 0.6)
    merge_sources(method, sources, weights, tmp_path / "out", space="factor", precision={"prior": 0.125})
    tensors, precisions = read_tensors(tmp_path / "out", "adapter_model"), read_precisions(tmp_path / "out")
    prior, shares = (0.125, (0.25, 0.5)) if method in PRIOR_METHODS else (0.0, (0.0, 0.0))
    reference = max(abs(s) for s in scalings)
    for module in SHAPES:
        (a, spread_a), (b, spread_b) = factor_truth(
            method, sources, weights, module, prior=prior, shares=shares, reference=reference
        )
        name_a, name_b = factor_names(module)
        assert_close(tensors[name_a], a)
        assert_close(tensors[name_b], reference * b)
        assert_close(precisions[name_a], spread_a, 1e-6)
        assert_close(precisions[name_b], spread_b / reference**2, 1e-6)


@pytest.mark.parametrize("method", PRECISION_METHODS)
def test_a_single_source_in_factor_space_is_kept(method: str, tmp_path: Path) -> None:
    (source,) = write_sources(tmp_path, Make(scaling=2.0, facts={"prior_precision": 0.25}))
    merge_sources(method, [source], (1.0,), tmp_path / "out", space="factor", precision={"prior": 0.25})
    tensors, precisions = read_tensors(tmp_path / "out", "adapter_model"), read_precisions(tmp_path / "out")
    for module in SHAPES:
        for factor, name, baked in zip((0, 1), factor_names(module), (1.0, 2.0), strict=True):
            assert_close(tensors[name], baked * source.factors[module][factor].double(), 1e-14)
            assert_close(precisions[name], source.precisions[module][factor].double() / baked**2, 1e-6)


@pytest.mark.parametrize("method", SCALAR_METHODS + PRECISION_METHODS)
def test_the_size_of_the_cross_terms_is_reported(method: str, tmp_path: Path) -> None:
    sources = write_sources(tmp_path, Make(scaling=0.5), Make(scaling=2.0))
    recipe = {"space": "factor", "precision": {"prior": 0.125}} if method in PRECISION_METHODS else {"space": "factor"}
    report = merge_sources(method, sources, (0.75, 0.5), tmp_path / "out", **recipe).report
    shares = {"linear": (0.6, 0.4), "hessian_weighted": (0.6, 0.4)}.get(method, (0.75, 0.5))
    for module in SHAPES:
        exact = sum(w * source.update(module) for w, source in zip(shares, sources, strict=True))
        gap = torch.linalg.norm(merged_update(tmp_path / "out", module) - exact) / torch.linalg.norm(exact)  # type: ignore[arg-type]
        assert report["layers"][module]["cross_terms"] == pytest.approx(float(gap), rel=1e-9)
        assert float(gap) > 0.1


def test_adapters_with_one_common_factor_have_no_cross_terms(tmp_path: Path) -> None:
    sources = write_sources(tmp_path, Make(scaling=0.5, facts=None), Make(scaling=2.0, facts=None))
    shared = {name: (sources[0].factors[name][0], b) for name, (_, b) in sources[1].factors.items()}
    write_adapter(sources[1].folder, shared, alpha=4.0)
    report = merge_sources("linear", sources, (0.75, 0.5), tmp_path / "out", space="factor").report
    assert all(layer["cross_terms"] < 1e-12 for layer in report["layers"].values())
