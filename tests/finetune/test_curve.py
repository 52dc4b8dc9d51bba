"""The picture of the loss: drawn without a display, from whatever a log holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergekit_bayes.errors import OutputError
from mergekit_bayes.finetune.curve import draw_curve

ROWS: list[dict[str, Any]] = [
    {"step": step, "loss": 4 / (step + 1), "learning_rate": 0.1 - step / 200} for step in range(1, 20)
]
ROWS += [{"step": step, "eval": {"dev": {"loss": 3.0 / step}, "other": {"loss": None}}} for step in (10, 19)]


def test_equal_logs_give_equal_pictures(tmp_path: Path) -> None:
    for name in ("one.png", "two.png"):
        draw_curve(tmp_path / name, ROWS, unit="token")
    content = (tmp_path / "one.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert content == (tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize("rows", [[], [{"step": 1, "loss": None}], ROWS[:1]])
def test_a_log_with_little_in_it_will_do(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    draw_curve(tmp_path / "loss.png", rows, unit="example")
    assert (tmp_path / "loss.png").stat().st_size > 0


def test_no_display_and_no_global_figures_are_touched(tmp_path: Path) -> None:
    import sys

    before = "matplotlib.pyplot" in sys.modules
    draw_curve(tmp_path / "loss.png", ROWS, unit="token")
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_a_folder_that_is_not_there_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"loss\.png: cannot write"):
        draw_curve(tmp_path / "missing" / "loss.png", ROWS, unit="token")
