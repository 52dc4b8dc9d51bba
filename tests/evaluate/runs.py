"""Evaluation recipes over tables in memory, run in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_bayes.evaluate.run import EvaluateResult, evaluate
from tests.finetune.runs import labelled, texts

TABLES: Mapping[str, list[dict[str, Any]]] = {
    "texts": texts(21),
    "other texts": texts(9, seed=24),
    "labelled": labelled(24),
    "other labelled": labelled(9, seed=5),
    "one class": [row for row in labelled(24) if row["label"] == "plant"],
}


def recipe(models: Sequence[object], **keys: Any) -> dict[str, Any]:
    """An evaluation in small batches with few resamples."""
    listed = [str(model) if isinstance(model, Path) else model for model in models]
    content = {"kind": "evaluate", "models": listed, "data": "texts", "batch_size": 4, **keys}
    return {"intervals": {"resamples": 200}, **content}


def run(content: Mapping[str, Any], out: Path | None = None, **options: Any) -> EvaluateResult:
    return evaluate(content, out, tables=TABLES, **options)
