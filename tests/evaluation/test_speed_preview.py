"""The benchmark of previews runs, and its page shows its results."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from evaluation.speed import preview


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_the_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--size", "tiny", "--groups", "2", "--length", "8", "--partitions", "4"]
    preview.main([*small, "--out", str(tmp_path)])
    results = json.loads((tmp_path / "preview.json").read_text())
    page = (tmp_path / "preview.md").read_text()
    assert page == preview.page(results)
    assert page in capsys.readouterr().out
    assert results["evaluations"]["mixes"] == 8
    assert set(results["evaluations"]["of_plain"]) == {"together", "plain adapter", "merge, then forward"}
    assert results["evaluations"]["of_plain"]["plain adapter"] == 1.0
    assert results["predictions"]["mixes"] == 15
    if (os.cpu_count() or 1) > 1:
        assert results["processes"]["same_numbers"] is True
        assert min(results["processes"]["per_second"].values()) > 0
        assert "| two processes, evaluations per second over those of one |" in page
