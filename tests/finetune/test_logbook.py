"""The log: one row per line, whole after every row, readable as JSON whatever the numbers were."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from mergekit_bayes.errors import CheckpointError, OutputError
from mergekit_bayes.finetune.logbook import LogBook, flat


def test_rows_are_in_the_file_at_once(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with LogBook(path) as log:
        log.add({"step": 1, "loss": 2.5})
        assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1, "loss": 2.5}]
        log.add({"step": 2, "eval": {"dev": {"loss": 3.0}}})
        assert path.read_text() == log.text
    assert log.last("eval") == {"dev": {"loss": 3.0}}
    assert log.last("no such key") is None


def test_a_log_goes_on_from_the_text_of_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with LogBook(path) as log:
        for step in range(5):
            log.add({"step": step})
            if step == 2:
                text = log.text
    with LogBook(path, text) as log:
        log.add({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 3]


def test_numbers_that_json_has_no_word_for_become_null(tmp_path: Path) -> None:
    with LogBook(tmp_path / "log.jsonl") as log:
        log.add({"step": 1, "loss": math.nan, "ivon": {"noise_to_progress": math.inf}})
    row = json.loads((tmp_path / "log.jsonl").read_text(), parse_constant=pytest.fail)
    assert row == {"step": 1, "loss": None, "ivon": {"noise_to_progress": None}}


def test_a_process_that_does_not_write_has_the_rows_all_the_same() -> None:
    with LogBook(None) as log:
        log.add({"step": 1})
    assert log.rows == [{"step": 1}]


@pytest.mark.parametrize("text", ["{", "[1]", '"x"'])
def test_what_is_no_log_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="log of a checkpoint"):
        LogBook(None, text)


def test_a_folder_that_is_not_there_is_an_error_of_the_disk(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"log\.jsonl: cannot write"):
        LogBook(tmp_path / "missing" / "log.jsonl")


def test_trackers_get_flat_numbers() -> None:
    row = {"step": 3, "loss": 1.0, "name": "x", "done": True, "eval": {"dev": {"loss": 2.0, "note": None}}}
    assert flat(row) == {"step": 3, "loss": 1.0, "eval/dev/loss": 2.0}
