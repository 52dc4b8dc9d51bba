"""Precision recipes over tiny models and tables in memory, run in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mergekit_bayes.estimate.run import PrecisionResult, estimate_precision
from tests.finetune.runs import labelled, texts

TABLES: Mapping[str, list[dict[str, Any]]] = {"texts": texts(24), "labelled": labelled(24)}
SEEN = 12


def recipe(model: Path, adapter: Path | None = None, *, task: str = "causal_lm", **keys: Any) -> dict[str, Any]:
    """A pass over a few rows; keys given replace those here, None removes them."""
    content = {
        "kind": "precision",
        "model": {"path": str(model), "task": task},
        "adapter": None if adapter is None else str(adapter),
        "data": {"train": "texts" if task == "causal_lm" else "labelled"},
        "estimator": "fisher",
        "num_examples": SEEN,
        "batch_size": 3,
        **keys,
    }
    return {key: value for key, value in content.items() if value is not None}


def run(content: Mapping[str, Any], out: Path, **options: Any) -> PrecisionResult:
    return estimate_precision(content, out, tables=TABLES, **options)


def sidecar_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the sidecar in a folder."""
    return load_file(folder / "precision.safetensors")
