"""The report: in words for people, in plain data for logs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.data.loading import load, pairs, texts
from tests.data.tokenizers import turns


def test_the_report_in_words(tokenizer: Any) -> None:
    rows = [*texts("the quick brown fox jumps", "the dog", "", " ", "the lazy dog the lazy dog"), {"text": None}]
    data = load(rows, tokenizer, eval=texts("the dog", "the fox"), max_length=4)
    assert data.report.lines() == [
        "memory0 (train, text): 2 rows, 6 of 8 tokens learned",
        "  of 6 rows read: 3 empty, 1 also in the held-out data",
        "  2 rows cut to max_length, 5 tokens (38.5%) lost",
        "memory1 (eval, text): 2 rows, 4 of 6 tokens learned",
    ]


def test_the_report_as_plain_data(tokenizer: Any) -> None:
    data = load(pairs(("the", " dog"), ("the", "")), tokenizer)
    plain = json.loads(json.dumps(data.report.plain()))
    assert plain["notes"] == []
    (report,) = plain["datasets"]
    assert {name: value for name, value in report.items() if value not in (0, None, [])} == {
        "name": "memory0",
        "path": "memory0",
        "role": "train",
        "format": "prompt_completion",
        "read": 2,
        "empty": 1,
        "longest": 3,
        "rows": 1,
        "segments": 1,
        "tokens": 3,
        "units": 2,
    }


def test_a_long_document_that_is_cut_is_not_lost_in_silence(tmp_path: Path, tokenizer: Any) -> None:
    """The remedy is packing, which cuts it into rows instead."""
    (tmp_path / "book.txt").write_text("the lazy dog\n" * 200)
    cut = load(tmp_path / "book.txt", tokenizer, max_length=32)
    assert any("1 rows cut to max_length" in line and "lost" in line for line in cut.report.lines())
    packed = load(tmp_path / "book.txt", tokenizer, max_length=32, packing=True)
    assert packed.train.num_tokens > 20 * cut.train.num_tokens
    assert not any("lost" in line for line in packed.report.lines())


def test_columns_that_nobody_reads_are_named(tokenizer: Any) -> None:
    rows = [{"messages": turns("hello", "hi there"), "tools": [], "source": "web"}]
    assert load(rows, tokenizer).report.lines()[1:] == [
        "  columns that are not read: tools, source",
        "  the column tools is not read: the chat template does not see what tools there are",
    ]


def test_progress_is_told_on_the_way(tokenizer: Any) -> None:
    told: list[tuple[str, int]] = []
    load(texts(*["the dog"] * 1100), tokenizer, eval=texts("the fox"), on_progress=lambda *found: told.append(found))
    assert told == [("memory0", 500), ("memory0", 1000), ("memory0", 1100), ("memory1", 1)]
