"""Steps of several optimizers, taken in turn in one process: a change in the machine's mood hits all of them."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Step = Callable[[], object]


@dataclass
class Runs:
    """Seconds of every timed step of one variant, in order.

    Attributes:
        wall: by the clock.
        cpu: of the processor, for what runs there: other programs on the machine lengthen it less.
    """

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def alternate(steps: Mapping[str, Step], *, repeats: int, warmup: int, device: str) -> dict[str, Runs]:
    """Take all steps in turn, `warmup` times without and `repeats` times with timing."""
    runs = {name: Runs() for name in steps}
    for repeat in range(warmup + repeats):
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat >= warmup:
                runs[name].wall.append(time.perf_counter() - wall)
                runs[name].cpu.append(time.process_time() - cpu)
    return runs


def ratio(above: list[float], below: list[float]) -> float:
    """Median of the ratios of steps taken one after the other."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def allocated(work: Step) -> tuple[int, int]:
    """Bytes that work on CPU allocates at its peak and has not given back at its end, by torch's account."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    del kept  # what the work returns was alive until here
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now


def machine(device: str) -> dict[str, Any]:
    """What the numbers were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    processor = [line for line in lines if line.startswith("model name")]
    return {
        "processor": processor[0].split(":")[1].strip() if processor else platform.processor(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "load at start": round(os.getloadavg()[0], 2),
    }


def described(where: Mapping[str, Any], end: float) -> str:
    """The machine in a sentence."""
    device = "" if where["device"] == "cpu" else f"{where['device']}; "
    load = f"load {where['load at start']} at the beginning and {end:.2f} at the end"
    cores = f"{where['cores']} cores of {where['processor']} ({where['vector instructions']})"
    threads = f"{where['threads']} thread{'s' if where['threads'] > 1 else ''}"
    return f"{device}{cores}, {threads}, torch {where['torch']}; {load}."
