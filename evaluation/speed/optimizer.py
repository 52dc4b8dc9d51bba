"""What one optimizer step costs per parameter: IVON here, AdamW of torch, and ivon-opt where it is importable.

    pip install --target FOLDER --no-deps ivon-opt==0.1.3
    OMP_NUM_THREADS=1 PYTHONPATH=FOLDER python -m evaluation.speed.optimizer

Writes optimizer.json and optimizer.md beside this file. A step is sample plus update (AdamW: update), float32, with
gradients already there. Steps of the things compared alternate; medians are reported, and ratios are medians of the
ratios of neighbours. The floor is the bytes that must move (40 per parameter for IVON, 28 for AdamW) at the measured
bandwidth of a copy. Memory is what torch allocated: what is kept from step to step, and what a step borrows at most.

On a GPU: --device cuda --layers 30 --entries 64000000.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import statistics
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evaluation.speed.alternate import Runs, Step, allocated, alternate, described, machine, ratio
from mergekit_bayes import IVON

HERE = Path(__file__).parent
OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 1e5, "hess_init": 0.1, "beta2": 0.9999, "weight_decay": 1e-4}
BYTES = {"IVON": 40, "IVON, not compiled": 40, "ivon-opt": 40, "AdamW, fused": 28, "AdamW, foreach": 28}
AIM = 3.0
"""How many times as fast as ivon-opt IVON should at least be."""
AIM_ON_A_GPU = 1.6
"""How many times as long as fused AdamW it may take there."""


HIDDEN, INNER = 512, 1408
Shapes = list[tuple[int, ...]]

LAYER: Shapes = [(HIDDEN, HIDDEN)] * 4 + [(INNER, HIDDEN)] * 2 + [(HIDDEN, INNER)] + [(HIDDEN,)] * 2
"""Shapes of the weights of one layer of a Llama: 3.2 million parameters."""


def sets(layers: int, tensors: int, entries: int) -> dict[str, Shapes]:
    """The layers of a model, and many equal tensors with fewer weights together."""
    return {"layers of a Llama": LAYER * layers, "equal tensors": [(entries // tensors,)] * tensors}


def parameters(of: Shapes, device: str) -> list[nn.Parameter]:
    """Random weights with gradients."""
    torch.manual_seed(0)
    made = [nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in of]
    for parameter in made:
        parameter.grad = torch.randn_like(parameter) * 0.01
    return made


def count(of: Shapes) -> int:
    """Entries of all."""
    return sum(math.prod(shape) for shape in of)


def variational(optimizer: Any) -> Step:
    """A step of an optimizer that samples."""

    def step() -> None:
        with optimizer.sampled_params(train=True):
            pass
        optimizer.step()

    return step


Make = Callable[[list[nn.Parameter]], Any]


def variants() -> dict[str, Make]:
    """What is compared."""
    made: dict[str, Make] = {
        "IVON": lambda weights: IVON(weights, **OPTIONS, fused=True),
        "IVON, not compiled": lambda weights: IVON(weights, **OPTIONS, fused=False),
        "AdamW, fused": lambda weights: torch.optim.AdamW(weights, fused=True),
        "AdamW, foreach": lambda weights: torch.optim.AdamW(weights, foreach=True),
    }
    try:
        reference = importlib.import_module("ivon")
    except ImportError:
        print("ivon-opt is not importable: left out", file=sys.stderr)
    else:
        made["ivon-opt"] = lambda weights: reference.IVON(weights, **OPTIONS)
    return made


def stepping(optimizer: Any) -> Step:
    """The step of one of them."""
    return variational(optimizer) if hasattr(optimizer, "sampled_params") else optimizer.step


def memory(make: Make, of: Shapes) -> dict[str, float]:
    """Bytes per parameter that an optimizer keeps from step to step, and that a step borrows at most."""
    weights, entries = parameters(of, "cpu"), count(of)

    def build() -> Step:
        step = stepping(make(weights))
        step()
        return step

    _, kept = allocated(build)
    step = build()
    peak, _ = allocated(step)
    return {"kept": kept / entries, "borrowed": peak / entries}


def measure(of: Shapes, repeats: int, device: str) -> tuple[dict[str, Runs], dict[str, Any]]:
    """Times of all variants, and on CPU their memory."""
    made, entries = variants(), count(of)
    # before the times: torch's profiler slows down what comes after it
    bytes_per = {name: memory(make, of) for name, make in made.items()} if device == "cpu" else {}
    steps = {name: stepping(make(parameters(of, device))) for name, make in made.items()}
    source, target = torch.ones(entries, device=device), torch.zeros(entries, device=device)
    numbers = torch.zeros(entries, device=device)
    steps |= {"copy": lambda: target.copy_(source), "normal numbers": numbers.normal_}
    return alternate(steps, repeats=repeats, warmup=3, device=device), bytes_per


def summary(case: dict[str, Any]) -> dict[str, Any]:
    """Medians in nanoseconds per parameter, and ratios, for one set of weights."""
    scale = 1e9 / case["entries"]
    runs = {name: Runs(**values) for name, values in case["runs"].items()}
    ours = runs["IVON"]
    found: dict[str, Any] = {
        "wall": {name: statistics.median(each.wall) * scale for name, each in runs.items()},
        "cpu": {name: statistics.median(each.cpu) * scale for name, each in runs.items()},
        "IVON of fused AdamW": ratio(ours.wall, runs["AdamW, fused"].wall),
    }
    if "ivon-opt" in runs:
        found["ivon-opt of IVON"] = ratio(runs["ivon-opt"].wall, ours.wall)
        found["ivon-opt of IVON, processor time"] = ratio(runs["ivon-opt"].cpu, ours.cpu)
        found["ivon-opt of IVON, not compiled"] = ratio(runs["ivon-opt"].wall, runs["IVON, not compiled"].wall)
    return found


def most(found: dict[str, Any]) -> float:
    """How many times as fast as ivon-opt a step could be that draws its numbers and moves its bytes, and is done."""
    wall = found["wall"]
    return float(wall["ivon-opt"] / (wall["normal numbers"] + BYTES["IVON"] * wall["copy"] / 8))


def table(name: str, case: dict[str, Any]) -> list[str]:
    """The results on one set of weights."""
    found = summary(case)
    per_byte = found["wall"]["copy"] / 8
    lines = [f"## {name.capitalize()}", "", f"{case['entries']:,} parameters, float32, in {case['tensors']} tensors."]
    lines += ["", "| | ns per parameter | processor time | floor by bytes | bytes kept | bytes borrowed |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    for variant, value in found["wall"].items():
        memory = case["memory"].get(variant)
        floor = _rounded(BYTES[variant] * per_byte) if variant in BYTES else ""
        cells = [_rounded(value), _rounded(found["cpu"][variant]), floor]
        cells += [f"{memory['kept']:.1f}", f"{memory['borrowed']:.1f}"] if memory else ["", ""]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    lines.append("")
    if "ivon-opt of IVON" in found:
        plain, timed = found["ivon-opt of IVON"], found["ivon-opt of IVON, processor time"]
        without = found["ivon-opt of IVON, not compiled"]
        lines += [
            f"IVON takes a step {plain:.2f} times as fast as ivon-opt 0.1.3 ({timed:.2f} times by processor time); at",
            f"least {AIM:g} times is the aim. Without a compiler it is {without:.2f} times as fast.",
            f"Drawing the numbers and moving the bytes alone would be {most(found):.2f} times as fast as ivon-opt.",
        ]
    noise = found["wall"]["normal numbers"] / found["wall"]["AdamW, fused"]
    times = f"It takes {found['IVON of fused AdamW']:.1f} times as long as fused AdamW"
    if case["memory"]:
        return [*lines, f"{times}; drawing the normal numbers alone", f"takes {noise:.1f} times as long.", ""]
    # on a GPU
    aim = f"{times}; at most {AIM_ON_A_GPU:g} times is the aim."
    return [*lines, aim, f"Drawing the normal numbers alone takes {noise:.1f} times as long.", ""]


def _rounded(nanoseconds: float) -> str:
    return f"{nanoseconds:.2f}" if nanoseconds >= 0.1 else f"{nanoseconds:.4f}"


def page(results: dict[str, Any]) -> str:
    """The results for people."""
    lines = ["# One optimizer step", "", described(results["machine"], results["load at end"]), ""]
    for name, case in results["cases"].items():
        lines += table(name, case)
    return "\n".join([*lines, f"`{results['command']}`, {results['date']}", ""])


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write results and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=3, help="of a Llama, 3.2 million parameters each")
    parser.add_argument("--tensors", type=int, default=64, help="equal tensors, so many")
    parser.add_argument("--entries", type=int, default=8_000_000, help="of all these tensors together")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for optimizer.json and optimizer.md")
    given = parser.parse_args(arguments)
    where, cases = machine(given.device), {}
    for name, of in sets(given.layers, given.tensors, given.entries).items():
        runs, memory = measure(of, given.repeats, given.device)
        cases[name] = {
            "entries": count(of),
            "tensors": len(of),
            "runs": {variant: vars(each) for variant, each in runs.items()},
            "memory": memory,
        }
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": f"python -m evaluation.speed.optimizer --layers {given.layers} --tensors {given.tensors}"
        f" --entries {given.entries} --repeats {given.repeats} --device {given.device}",
        "machine": where,
        "load at end": os.getloadavg()[0],
        "cases": cases,
        "summary": {name: summary(case) for name, case in cases.items()},
    }
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "optimizer.json").write_text(json.dumps(results, indent=2) + "\n")
    (given.out / "optimizer.md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
