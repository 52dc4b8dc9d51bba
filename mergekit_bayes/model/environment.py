"""The machine and the libraries that a run used, for its report."""

from __future__ import annotations

import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version

__all__ = ["peak_memory", "versions"]

_PACKAGES = ("mergekit-bayes", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "bitsandbytes")


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
