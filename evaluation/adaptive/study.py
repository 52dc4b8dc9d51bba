"""Does a design that adapts find more of a front than one of the same size that is laid down beforehand?

    python -m evaluation.adaptive.study FOLDER [--out FOLDER]

Run from the root of the repository. FOLDER keeps every evaluated mix: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import combinations
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from evaluation.adaptive.report import figure, tables
from evaluation.speed.alternate import machine
from mergekit_bayes.preview.design import Mix, in_order_of_spread, lattice, lattice_size, scaled
from mergekit_bayes.preview.front import hypervolume
from mergekit_bayes.preview.run import preview

Gains: TypeAlias = Mapping[Mix, NDArray[np.float64]]
"""What every mix of a design gains, by task: 0 is the base, 1 the task's expert."""

EXAMPLE = Path("examples/stdlib_lm")
EXPERTS = ("code", "docs", "headers")
METHODS: Mapping[str, Mapping[str, Any]] = {
    "task_arithmetic": {},
    "hessian_weighted": {"space": "full"},
    "posterior": {"space": "full"},
}
DESIGNS: Mapping[str, tuple[float, ...]] = {"simplex": (1.0,), "simplex at two scales": (1.0, 1.5)}
"""Scales of the lattice, by what tables call the design; the last one has all mixes of the others."""
GRIDS = {2: (24, (6, 8, 12)), 3: (12, (4, 6))}
"""By the number of tasks: partitions of the lattice, and of the coarser ones whose sizes are the budgets."""
RANDOM_DESIGNS = 200


@dataclass(frozen=True)
class Problem:
    """Experts that are mixed by a method, and judged by the task of each."""

    experts: tuple[str, ...]
    method: str
    rows: int

    @property
    def name(self) -> str:
        return f"{'+'.join(self.experts)} {self.method}"

    def recipe(self, partitions: int, scales: Sequence[float], **design: Any) -> dict[str, Any]:
        """The preview over a lattice of weights."""
        return {
            "kind": "preview",
            "base_model": str(EXAMPLE / "artefacts" / "base"),
            "models": [{"model": str(EXAMPLE / "artefacts" / expert)} for expert in self.experts],
            "methods": [{"merge_method": self.method, **METHODS[self.method]}],
            "precision": {"prior": 0.001},
            "tasks": [self._task(expert) for expert in self.experts],
            "design": {"partitions": partitions, "scales": list(scales), **design},
            "fidelity": "evaluated",
            "evaluation": {"batch_size": 12, "mixes_per_batch": 3},
        }

    def _task(self, expert: str) -> dict[str, Any]:
        data = {"path": str(EXAMPLE / "held_out" / f"{expert}.txt"), "format": "text"}
        return {"data": {"eval": data, "max_length": 256, "packing": True}, "max_rows": self.rows}


def problems(rows: int) -> list[Problem]:
    """Every pair and the triple of the example's experts, by every method."""
    groups = [experts for size in GRIDS for experts in combinations(EXPERTS, size)]
    return [Problem(experts, method, rows) for experts in groups for method in METHODS]


def gains_of(front: Mapping[str, Any]) -> dict[Mix, NDArray[np.float64]]:
    """What was evaluated."""
    found = {}
    for point in front["points"]:
        if "evaluated" in point:
            found[tuple(point["weights"])] = np.array(list(point["evaluated"]["normalised"].values()), dtype=np.float64)
    return found


def volume(gains: Sequence[NDArray[np.float64]]) -> float:
    """What a front dominates above the base."""
    points = np.stack(gains)
    return hypervolume(points, np.zeros(points.shape[1]))


def compare(problem: Problem, folder: Path, grids: tuple[int, Sequence[int]]) -> Iterator[dict[str, Any]]:
    """Evaluates the whole design of a problem, and lets every way spend every budget on it.

    Args:
        problem: the problem.
        folder: of its mixes, kept from one call to the next.
        grids: partitions of the whole lattice and of those whose sizes are the budgets.

    Yields:
        For every design and budget, the share of the whole design's hypervolume that every way misses.
    """
    finest, coarser = grids
    every = gains_of(preview(problem.recipe(finest, list(DESIGNS.values())[-1]), folder / "whole").front)
    for name, scales in DESIGNS.items():
        design = [mix for mix in scaled(lattice(len(problem.experts), finest), scales) if mix in every]
        best = volume([every[mix] for mix in design])
        for partitions in coarser:
            budget = lattice_size(len(problem.experts), partitions)
            found = dict(laid_down({mix: every[mix] for mix in design}, budget))
            if len(scales) == 1:
                grid = scaled(lattice(len(problem.experts), partitions), scales)
                found["grid"] = volume([every[mix] for mix in grid])
            out = folder / f"{name} {budget}".replace(" ", "-")
            found["adaptive"] = volume(adapted(problem, out, problem.recipe(finest, scales, adaptive=True), budget))
            missed = {way: round(1 - value / best, 5) for way, value in found.items()}
            yield {"design": name, "mixes": len(design), "budget": budget, "hypervolume": best, "missed": missed}


def laid_down(every: Gains, budget: int) -> Iterator[tuple[str, float]]:
    """What designs find that are laid down beforehand: spread as far as possible, and at random."""
    order = in_order_of_spread(list(every))
    yield "spread", volume([every[mix] for mix in order[:budget]])
    generator = np.random.Generator(np.random.PCG64(0))
    drawn = [generator.choice(len(order), budget, replace=False) for _ in range(RANDOM_DESIGNS)]
    yield "random", float(np.mean([volume([every[order[place]] for place in places]) for places in drawn]))


def adapted(problem: Problem, out: Path, recipe: dict[str, Any], budget: int) -> list[NDArray[np.float64]]:
    """What the previewer looks at by itself; the scores of mixes that the whole design has are taken from there."""
    if not out.exists():
        shutil.copytree(out.parent / "whole", out)
    found = gains_of(preview({**recipe, "budget": {"points": budget}}, out).front)
    if len(found) != budget:
        raise SystemExit(f"{problem.name}: {len(found)} mixes were evaluated; expected {budget}")
    return list(found.values())


def study(folder: Path, rows: int, grids: Mapping[int, tuple[int, Sequence[int]]]) -> dict[str, Any]:
    """Every problem."""
    found = {}
    for problem in problems(rows):
        own = folder / problem.name.replace(" ", "-")
        found[problem.name] = list(compare(problem, own, grids[len(problem.experts)]))
        print(problem.name, json.dumps([each["missed"] for each in found[problem.name]]), flush=True)
    return {"date": date.today().isoformat(), "machine": machine("cpu"), "rows": rows, "problems": found}


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluate, compare; write results, tables and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps what was evaluated")
    parser.add_argument("--rows", type=int, default=8, help="windows of 256 tokens per task")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args(argv)
    results = study(options.folder, options.rows, GRIDS)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    figure(results, options.out / "adaptive.png")
    print(tables(results))


if __name__ == "__main__":
    main()
