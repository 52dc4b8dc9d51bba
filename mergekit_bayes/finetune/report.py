"""What a finished run says about itself, as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mergekit_bayes.model.environment import peak_memory, versions

__all__ = ["REPORT_NAME", "peak_memory", "report_text", "versions"]

REPORT_NAME = "finetune_report.json"
FORMAT = "mergekit_bayes.finetune_report"
VERSION = 1


def report_text(content: Mapping[str, Any]) -> str:
    """Returns a report as JSON text with sorted keys."""
    whole = {"format": FORMAT, "version": VERSION, **content}
    return json.dumps(whole, indent=2, sort_keys=True, allow_nan=False) + "\n"
