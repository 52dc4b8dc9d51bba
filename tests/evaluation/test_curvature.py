"""The study of IVON's curvature: it runs, and its page shows what it found."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from evaluation.curvature import fisher

HERE = Path(fisher.__file__).parent


def test_agreement_of_equal_and_scaled_curvatures() -> None:
    values = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    assert fisher._agreement(3 * values, values) == pytest.approx(
        {"median_ratio": 3.0, "ratio_of_means": 3.0, "spearman": 1.0}
    )
    assert fisher._agreement(1 / values, values)["spearman"] == pytest.approx(-1.0)


@pytest.mark.slow
def test_runs_on_one_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fisher", "--rows", "2", "--domains", "docs", "--out", out])
    monkeypatch.setattr(sys, "path", list(sys.path))
    fisher.main()
    found = json.loads((tmp_path / "results.json").read_text())["domains"]["docs"]
    assert found["inflation"] > 1
    assert set(found["factors"]) == {"A", "B"}
    assert all(values["spearman"] > 0 for values in found["factors"].values())


def test_the_page_shows_the_results() -> None:
    results = json.loads((HERE / "results.json").read_text())
    assert fisher.table(results) in (HERE / "README.md").read_text()
