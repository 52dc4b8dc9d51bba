"""Kronecker factors are those that curvlinops finds, from its committed results and afresh where it is installed."""

from __future__ import annotations

import warnings

import pytest
import torch
from safetensors.torch import load_file

from tests.precision import curvlinops_factors
from tests.precision.test_kronecker import OfTheData, dense, run, targets_of


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_equals_curvlinops(kind: str) -> None:
    model = curvlinops_factors.Pooled().eval()
    x, labels = curvlinops_factors.batch()
    estimator = OfTheData(model, targets_of(model, "kfac"), chunk_size=3, options={"eigenvalues": kind == "ekfac"})
    found = estimator.result(run(estimator, {"x": x, "labels": labels, "row": torch.arange(len(x))}))
    golden = load_file(curvlinops_factors.GOLDEN)
    for name in dict(model.named_parameters()):
        expected = golden[f"{kind}.{name}"]
        torch.testing.assert_close(dense(name, found), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_the_committed_results_are_what_it_finds_today() -> None:
    pytest.importorskip("curvlinops")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = curvlinops_factors.dense()
    golden = load_file(curvlinops_factors.GOLDEN)
    assert found.keys() == golden.keys()
    for name, value in golden.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
