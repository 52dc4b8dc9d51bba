"""The machine and the libraries that a run uses, for its report and for advice."""

from __future__ import annotations

import platform
import resource
import sys
import time
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["peak_memory", "slow_dtype", "versions"]

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


_MUCH = 3.0


def slow_dtype(dtype: torch.dtype, device: torch.device) -> str | None:
    """Returns a sentence where a processor takes much longer in a dtype than in float32, since it has to emulate it.

    Args:
        dtype: what a model computes in.
        device: where.
    """
    import torch

    if device.type != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return None
    times = _times_as_long(dtype)
    if times < _MUCH:
        return None
    name = str(dtype).removeprefix("torch.")
    return f"this processor takes {times:.0f} times as long for products in {name} as in float32"


@cache
def _times_as_long(dtype: torch.dtype) -> float:
    """How many times as long as in float32 a product of matrices takes; found out by trying, in milliseconds."""
    import torch

    def seconds(kind: torch.dtype) -> float:
        factor = torch.ones(256, 256, dtype=kind)
        found = []
        for _ in range(4):  # the first one makes the kernel
            began = time.perf_counter()
            torch.nn.functional.linear(factor, factor)
            found.append(time.perf_counter() - began)
        return min(found[1:])

    return seconds(dtype) / seconds(torch.float32)
