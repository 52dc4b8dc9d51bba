"""What a person sees of a run."""

from __future__ import annotations

import sys

import pytest

from mergekit_bayes.finetune.progress import describe_row, duration, follow

ROW = {"loss": 2.5, "learning_rate": 0.01, "tokens_per_second": 12345.6, "seconds_left": 75.0}
SCORES = {"eval": {"dev": {"loss": 3.0, "accuracy": 0.5, "units": 10.0}}}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1:00 min"), (200, "3:20 min"), (7500, "2:05 h"), (90000, "25:00 h")]
)
def test_times_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_row_is_one_line() -> None:
    assert describe_row(ROW) == "loss 2.5000  lr 0.01  12,346 tokens/s  1:15 min left"
    assert describe_row(SCORES) == "dev: loss 3, accuracy 0.5"
    assert describe_row({}) == ""


def test_without_a_terminal_there_are_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with follow(show=True, done=0, total=20) as progress:
        progress.note("a note")
        progress.advance(5, ROW)
        progress.log(10, ROW)
    assert capsys.readouterr() == ("", "a note\nstep 10/20  loss 2.5000  lr 0.01  12,346 tokens/s  1:15 min left\n")


def test_on_a_terminal_there_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "150")
    with follow(show=True, done=3, total=20) as progress:
        progress.note("IVON starts with [0.9, 1.1]")
        progress.advance(10, ROW)
        progress.log(10, SCORES)
        progress.log(10, ROW)
    shown = capsys.readouterr().err
    assert "IVON starts with [0.9, 1.1]" in shown
    assert "10/20" in shown
    assert "loss 2.5000  lr 0.01  12,346 tokens/s  1:15 min left" in shown
    assert "step 10  dev: loss 3, accuracy 0.5" in shown


def test_a_quiet_run_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with follow(show=False, done=0, total=20) as progress:
        progress.note("a note")
        progress.advance(5, ROW)
        progress.log(5, ROW)
    assert capsys.readouterr() == ("", "")
