"""What a preview cost, beside what it saves: training of the sources, the sweep, and the runs it stands for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["cost_table", "source_seconds"]

_TRAINING, _PRECISION = "finetune_report.json", "precision_report.json"


def source_seconds(folder: Path) -> Mapping[str, float]:
    """Seconds that training and the precision pass of a source took, as far as its folder tells."""
    found = {}
    for name, file, keys in (
        ("training", _TRAINING, ("training",)),
        ("precision", _PRECISION, ("total", "estimation")),
    ):
        try:
            seconds = json.loads((folder / file).read_text(encoding="utf-8"))["seconds"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        values = [seconds.get(key) for key in keys] if isinstance(seconds, dict) else [seconds]
        known = [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]
        if known:
            found[name] = known[0]
    return found


def cost_table(
    sources: Sequence[Mapping[str, float]],
    *,
    surrogate: float | None,
    evaluated: float,
    mixes: int,
    reference_minutes: Sequence[float | None],
) -> dict[str, Any]:
    """The costs in seconds; None where nobody knows.

    Args:
        sources: of `source_seconds`, one per source.
        surrogate: of the data-free tier; None where there was none.
        evaluated: of all evaluations, also those of earlier runs.
        mixes: that were looked at.
        reference_minutes: of the reference runs, where known.
    """
    training = [source["training"] for source in sources if "training" in source]
    known = [60 * minutes for minutes in reference_minutes if minutes is not None]
    whole = sum(training) if len(training) == len(sources) else None
    one_run = sum(known) / len(known) if known else whole
    return {
        "training_of_sources": whole,
        "precision_passes": sum(source.get("precision", 0.0) for source in sources),
        "surrogate": surrogate,
        "evaluation": evaluated,
        "one_run_on_all_tasks": one_run,
        "one_run_is": "mean of the references" if known else "sum of the sources' training" if whole else None,
        "runs_it_stands_for": mixes,
        "seconds_they_would_take": None if one_run is None else one_run * mixes,
    }
