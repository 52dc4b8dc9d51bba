"""The study of adaptive designs runs on the example, from evaluations to tables and a figure."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evaluation.adaptive import report, study

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_way_spends_the_same_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    problem = study.Problem(("code", "docs"), "task_arithmetic", rows=1)
    rows = list(study.compare(problem, tmp_path / "mixes", (4, (2,))))
    assert [row["mixes"] for row in rows] == [5, 10]
    assert [row["budget"] for row in rows] == [3, 3]
    assert set(rows[0]["missed"]) == {"spread", "random", "grid", "adaptive"}
    assert set(rows[1]["missed"]) == {"spread", "random", "adaptive"}
    for row in rows:
        assert all(0 <= missed < 1 for missed in row["missed"].values())
        seen = (tmp_path / "mixes" / f"{row['design'].replace(' ', '-')}-3" / "evaluations.jsonl").read_text()
        assert seen == (tmp_path / "mixes" / "whole" / "evaluations.jsonl").read_text()  # nothing was evaluated twice
    results = {"problems": {problem.name: rows}}
    assert "| 2 | simplex | 3 |" in report.tables(results)
    report.figure(results, tmp_path / "adaptive.png")
    assert (tmp_path / "adaptive.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_the_committed_results() -> None:
    folder = Path(study.__file__).parent
    assert report.tables(json.loads((folder / "results.json").read_text())) in (folder / "README.md").read_text()
