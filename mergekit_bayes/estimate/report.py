"""What a finished pass says about itself, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_bayes.precision.convergence import Change

__all__ = ["convergence_of", "report_text"]

FORMAT = "mergekit_bayes.precision_report"
VERSION = 1


def report_text(content: Mapping[str, Any]) -> str:
    """Returns a report as JSON text with sorted keys."""
    whole = {"format": FORMAT, "version": VERSION, **content}
    return json.dumps(whole, indent=2, sort_keys=True, allow_nan=False) + "\n"


def convergence_of(changes: Sequence[Change]) -> list[dict[str, float]]:
    """Returns how far an estimate moved, for the report: units looked at, those before, and the median over tensors."""
    return [{"units": change.units, "since": change.since, "median": change.median} for change in changes]
