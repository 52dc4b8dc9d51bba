"""What one optimizer step costs per parameter: IVON here, fused AdamW, and ivon-opt where it is importable.

    OMP_NUM_THREADS=1 python -m evaluation.speed.optimizer --entries 8000000

Writes optimizer.json and optimizer.md beside this file. A step is sample plus update (AdamW: update), float32, with
gradients already there. Runs of the things compared alternate, medians are reported. The floor is the bytes that
must move (40 per parameter for IVON, 28 for AdamW) at the measured bandwidth of a copy.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_bayes import IVON

HERE = Path(__file__).parent
OPTIONS = {"lr": 0.1, "ess": 1e5, "hess_init": 0.1, "beta2": 0.9999, "weight_decay": 1e-4}
BYTES = {"IVON": 40, "ivon-opt": 40, "AdamW, fused": 28, "AdamW, foreach": 28}


def parameters(entries: int, tensors: int, device: str) -> list[nn.Parameter]:
    torch.manual_seed(0)
    made = [nn.Parameter(torch.randn(entries // tensors, device=device)) for _ in range(tensors)]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter) * 0.01
    return made


def variational(optimizer: Any) -> Callable[[], None]:
    def step() -> None:
        with optimizer.sampled_params(train=True):
            pass
        optimizer.step()

    return step


def plain(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
    return optimizer.step


def variants(entries: int, tensors: int, device: str) -> dict[str, Callable[[], object]]:
    def fresh() -> list[nn.Parameter]:
        return parameters(entries, tensors, device)

    made: dict[str, Callable[[], object]] = {
        "IVON": variational(IVON(fresh(), **OPTIONS)),
        "AdamW, fused": plain(torch.optim.AdamW(fresh(), fused=True)),
        "AdamW, foreach": plain(torch.optim.AdamW(fresh(), foreach=True)),
    }
    try:
        reference = importlib.import_module("ivon")
    except ImportError:
        print("ivon-opt is not importable: left out", file=sys.stderr)
    else:
        made["ivon-opt"] = variational(reference.IVON(fresh(), **OPTIONS))
    return made


def seconds(step: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def copying(entries: int, device: str) -> Callable[[], Tensor]:
    source, target = torch.ones(entries, device=device), torch.zeros(entries, device=device)
    return lambda: target.copy_(source)


def drawing(entries: int, device: str) -> Callable[[], Tensor]:
    target = torch.zeros(entries, device=device)
    return target.normal_


def measure(entries: int, tensors: int, repeats: int, device: str) -> dict[str, list[float]]:
    steps: dict[str, Callable[[], object]] = {**variants(entries, tensors, device)}
    steps |= {"copy": copying(entries, device), "normal numbers": drawing(entries, device)}
    runs: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 2):
        for name, step in steps.items():
            taken = seconds(step, device) / entries * 1e9
            if repeat >= 2:  # the first steps allocate state
                runs[name].append(taken)
    return runs


def page(results: dict[str, Any]) -> str:
    medians = results["medians"]
    per_byte = medians["copy"] / 8
    lines = ["# One optimizer step", "", results["machine"]["processor"], ""]
    lines += ["| | ns per parameter | floor by bytes | of fused AdamW |", "|---|---|---|---|"]
    for name, value in medians.items():
        floor = f"{BYTES[name] * per_byte:.2f}" if name in BYTES else ""
        lines.append(f"| {name} | {value:.2f} | {floor} | {value / medians['AdamW, fused']:.2f} |")
    if "ivon-opt" in medians:
        lines += [
            "",
            f"IVON is {medians['ivon-opt'] / medians['IVON']:.2f} times as fast as ivon-opt; at least 3 is the aim.",
        ]
    return "\n".join([*lines, "", f"`{results['command']}`, {results['date']}", ""])


def main() -> None:
    """Measure, and write results and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=8_000_000)
    parser.add_argument("--tensors", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for optimizer.json and optimizer.md")
    arguments = parser.parse_args()
    runs = measure(arguments.entries, arguments.tensors, arguments.repeats, arguments.device)
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    results = {
        "date": date.today().isoformat(),
        "command": f"python -m evaluation.speed.optimizer --entries {arguments.entries} --tensors {arguments.tensors}"
        f" --repeats {arguments.repeats} --device {arguments.device}",
        "machine": {
            "processor": processor[0].split(":")[1].strip() if processor else platform.processor(),
            "device": torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu",
            "threads": torch.get_num_threads(),
            "torch": version("torch"),
            "load_at_start": os.getloadavg()[0],
        },
        "runs": runs,
        "medians": {name: statistics.median(values) for name, values in runs.items()},
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "optimizer.json").write_text(json.dumps(results, indent=2) + "\n")
    (arguments.out / "optimizer.md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
