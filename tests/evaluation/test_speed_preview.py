"""The benchmark of previews runs, and its page shows its results."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import pytest
import torch

from evaluation.speed import preview
from mergekit_bayes.preview.design import random_mixes


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


@pytest.mark.parametrize("folder", ["", "gpu"])
def test_the_pages_show_the_committed_results(folder: str) -> None:
    pages = Path(preview.__file__).parent / folder
    assert (pages / "preview.md").read_text() == preview.page(json.loads((pages / "preview.json").read_text()))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_what_merges_on_a_device_and_what_shares_forward_passes_have_the_same_scores(tmp_path: Path) -> None:
    base, adapters = preview.made(tmp_path, "tiny")
    task = preview.rows("tiny", count=16, length=8)
    mixes = random_mixes(3, 4, seed=5)
    (method,) = preview.plan_methods(preview.recipe_of(tmp_path / "base", adapters, methods=["task_arithmetic"]))
    (seen,) = preview._evaluator(base, method, preview.in_batches(task, 4), iter(mixes), together=4)()
    merged = preview._merger(copy.deepcopy(base), adapters, task, iter(mixes), torch.float32)()
    expected = [alone for (alone,) in merged]
    for one, other in zip(seen, expected, strict=True):
        assert one.scores["random"]["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert len({round(each["loss"], 5) for each in expected}) == 4
