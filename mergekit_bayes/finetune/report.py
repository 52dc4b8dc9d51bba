"""What a finished run says about itself, as JSON."""

from __future__ import annotations

import json
import platform
import resource
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

__all__ = ["REPORT_NAME", "peak_memory", "report_text", "versions"]

REPORT_NAME = "finetune_report.json"
FORMAT = "mergekit_bayes.finetune_report"
VERSION = 1

_PACKAGES = ("mergekit-bayes", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "bitsandbytes")


def report_text(content: Mapping[str, Any]) -> str:
    """Returns a report as JSON text with sorted keys."""
    whole = {"format": FORMAT, "version": VERSION, **content}
    return json.dumps(whole, indent=2, sort_keys=True, allow_nan=False) + "\n"


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the installed packages that compute or store numbers."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def peak_memory() -> dict[str, int]:
    """Returns the most bytes in use so far: of this process, and on its accelerator if it has one."""
    import torch

    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"process": kilobytes * (1 if sys.platform == "darwin" else 1024)}
    if torch.cuda.is_available():
        found["accelerator"] = torch.cuda.max_memory_allocated()
    return found
