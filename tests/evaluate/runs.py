"""Evaluation recipes over tables in memory, run in this process."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_bayes.evaluate.run import EvaluateResult, evaluate
from tests.finetune.runs import WORDS, labelled, texts


def questions(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Questions of two to four words with two to five choices of one to four words."""
    draw = random.Random(seed)

    def words(most: int, least: int = 1) -> str:
        return " ".join(f"w{draw.randrange(WORDS)}" for _ in range(draw.randint(least, most)))

    rows = []
    for _ in range(count):
        choices = [words(4) for _ in range(draw.randint(2, 5))]
        rows.append({"question": words(4, 2), "choices": choices, "answer": draw.randrange(len(choices))})
    return rows


TABLES: Mapping[str, list[dict[str, Any]]] = {
    "texts": texts(21),
    "other texts": texts(9, seed=24),
    "labelled": labelled(24),
    "other labelled": labelled(9, seed=5),
    "questions": questions(22),
    "other questions": questions(9, seed=1),
    "one class": [row for row in labelled(24) if row["label"] == "plant"],
}


def recipe(models: Sequence[object], **keys: Any) -> dict[str, Any]:
    """An evaluation in small batches with few resamples."""
    listed = [str(model) if isinstance(model, Path) else model for model in models]
    content = {"kind": "evaluate", "models": listed, "data": "texts", "batch_size": 4, **keys}
    return {"intervals": {"resamples": 200}, **content}


def run(content: Mapping[str, Any], out: Path | None = None, **options: Any) -> EvaluateResult:
    return evaluate(content, out, tables=TABLES, **options)
