"""The benchmark of Kronecker merges compares with an exact mean, and its page shows the results beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from evaluation.speed import kronecker

PAGE = Path(kronecker.__file__).parent


def test_the_dense_mean_makes_the_sum_of_quadratics_least() -> None:
    """Weights sum to one, so that the exact mean minimises the average of the sources' own quadratics."""
    given = kronecker.layer(3, 5).to(torch.float64)
    mean = kronecker.dense(given).requires_grad_()
    loss = torch.stack([s.shrunk(kronecker.SHRINKAGE).quadratic(mean - s.mean) for s in given.sources]).sum()
    loss.backward()
    assert mean.grad is not None
    assert float(mean.grad.abs().max()) < 1e-9 * loss.item()


def test_errors_are_shares_of_the_correction() -> None:
    given = kronecker.layer(4, 6)
    exact = kronecker.dense(given)
    at_start = kronecker.errors(given, given.origin.double(), exact)
    half_way = kronecker.errors(given, (given.origin.double() + exact) / 2, exact)
    assert at_start == pytest.approx({"of the weights": 1.0, "of the loss": 1.0})
    assert half_way == pytest.approx({"of the weights": 0.5, "of the loss": 0.25})


def test_factors_share_part_of_their_directions() -> None:
    terms = [source.terms[0].input for source in kronecker.layer(8, 40).sources]
    assert all(torch.linalg.eigvalsh(term)[-1] > 5 * term.diagonal().mean() for term in terms)
    agree = torch.linalg.eigh(terms[0])[1][:, -3:].mT @ torch.linalg.eigh(terms[1])[1][:, -3:]
    assert 0.5 < float(torch.linalg.matrix_norm(agree, 2)) < 0.9999


def test_the_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kronecker.main(["--sizes", "6x10", "70x72", "--repeats", "2", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "kronecker.json").read_text())
    page = (tmp_path / "kronecker.md").read_text()
    assert page in capsys.readouterr().out
    assert page == kronecker.page(results)
    small, large = results["cases"]
    assert [small["reference"], large["reference"]] == ["dense", "float64, 1e-09"]
    assert set(small["rows"]) - set(large["rows"]) == {"dense, float64"}
    for case in results["cases"]:
        for tolerance in kronecker.TOLERANCES:
            row = case["rows"][f"kronecker, {tolerance:g}"]
            assert row["residual"] <= tolerance
            assert row["of the loss"] < 10 * max(tolerance, 1e-6) ** 2 + 1e-10
        assert case["rows"]["gram"]["of the loss"] > 1e-3


def test_the_page_shows_the_committed_results() -> None:
    results = json.loads((PAGE / "kronecker.json").read_text())
    assert (PAGE / "kronecker.md").read_text() == kronecker.page(results)
