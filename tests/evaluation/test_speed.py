"""The speed benchmark compares equal work, and its page shows the results that are committed beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evaluation.speed.checkpoints import SIZES, write_inputs
from evaluation.speed.merge import write_recipe
from evaluation.speed.plain import merge_plainly
from evaluation.speed.report import figure, tables, verdicts
from evaluation.speed.watch import watch
from mergekit_bayes import merge

PAGE = Path(__file__).parent.parent.parent / "evaluation" / "speed"


def test_plain_expression_and_merge_give_the_same_posterior(tmp_path: Path) -> None:
    write_inputs(tmp_path, SIZES["tiny"], sources=3, precisions=True)
    recipe = write_recipe(tmp_path, "gradient_matching", 3, precision=True)
    merge(recipe, tmp_path / "ours")
    merge_plainly(tmp_path, tmp_path / "plain", 3)
    for name in ("model.safetensors", "precision.safetensors"):
        ours, plain = load_file(tmp_path / "ours" / name), load_file(tmp_path / "plain" / name)
        assert ours.keys() == plain.keys()
        for key, expected in plain.items():
            assert ours[key].dtype == expected.dtype == torch.bfloat16
            torch.testing.assert_close(ours[key], expected, rtol=2**-7, atol=1e-7)


def test_sources_differ_from_the_base_and_from_each_other(tmp_path: Path) -> None:
    write_inputs(tmp_path, SIZES["tiny"], sources=2, precisions=False)
    base, one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "source1", "source2"))
    for name, tensor in base.items():
        assert not torch.equal(tensor, one[name])
        assert not torch.equal(one[name], two[name])
    assert sum(tensor.nbytes for tensor in base.values()) == SIZES["tiny"].nbytes


def test_watch_sees_the_memory_of_a_process_and_of_what_it_starts() -> None:
    hold = "import time; held = bytearray(200_000_000); time.sleep(0.5)"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}], check=True); print('done')"
    watched = watch([sys.executable, "-c", start])
    assert watched.output == "done\n"
    assert 200_000_000 < watched.peak_anonymous <= watched.peak_rss < 400_000_000
    assert watched.seconds > 0.5


def test_watch_reports_an_unexpected_end() -> None:
    with pytest.raises(RuntimeError, match=r"ended with 3:\nbecause"):
        watch([sys.executable, "-c", "import sys; print('because', file=sys.stderr); sys.exit(3)"])


@pytest.mark.slow
def test_benchmark_runs_from_beginning_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "evaluation.speed.merge", "--tiny", "--repeats", "1"]
    folders = ["--workdir", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    done = subprocess.run([*command, *folders], cwd=PAGE.parent.parent, capture_output=True, text=True, check=True)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert tables(results) == done.stdout.rstrip("\n")
    assert (tmp_path / "out" / "results.png").stat().st_size > 10_000


@pytest.mark.skipif(not (PAGE / "results.json").exists(), reason="no results of a complete run are committed yet")
def test_the_page_shows_the_committed_results(tmp_path: Path) -> None:
    results = json.loads((PAGE / "results.json").read_text())
    page = (PAGE / "README.md").read_text()
    missing = [table for table in tables(results).split("\n\n") if table not in page]
    assert missing == []
    assert results["verdicts"] == verdicts(results)
    figure(results, tmp_path / "results.png")
    assert (tmp_path / "results.png").stat().st_size > 10_000
