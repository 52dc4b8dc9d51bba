"""Previews on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Command

ROOT = Path(__file__).parents[2]
QUICKSTART = "recipes/preview/quickstart.yaml"
PREDICTED = ("--set", "fidelity=surrogate", "--set", "design.step=0.5")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_a_plan_says_what_the_budget_leaves_out(command: Command) -> None:
    done = command("plan", QUICKSTART, "--set", "budget.points=20", "--set", "budget.minutes=3")
    assert (done.code, done.err) == (0, "")
    assert "evaluated: 20 mixes, 70 skipped for the budget, and base and experts" in done.out
    assert "as many as 3 minutes allow" in done.out


def test_a_preview_is_run_and_summarised(command: Command, tmp_path: Path) -> None:
    done = command(QUICKSTART, tmp_path / "out", *PREDICTED)
    assert (done.code, done.err) == (0, "")
    assert "predicted by the posteriors; 0 is the base, 1 the expert" in done.out
    assert f"next: bayes-merge pick {tmp_path / 'out'} --max-min" in done.out
    picked = command("pick", tmp_path / "out", "--max-min")
    assert picked.code == 0
    assert "kind: merge" in picked.out


def test_what_a_preview_has_no_use_for_is_refused(command: Command, tmp_path: Path) -> None:
    done = command(QUICKSTART, tmp_path / "out", "--threads", "2")
    assert done.code == 2
    assert "recipes of kind `preview` have no use for it" in " ".join(done.err.split())
    assert not (tmp_path / "out").exists()


def test_without_a_folder_nothing_is_done(command: Command) -> None:
    done = command(QUICKSTART)
    assert done.code == 2
    assert "output.path: missing" in done.err
