"""What a merge under Kronecker posteriors costs per layer, and how far from the exact mean it stops.

    OMP_NUM_THREADS=1 python -m evaluation.speed.kronecker

Writes kronecker.json and kronecker.md beside this file. One linear layer, five tasks, float32, shrinkage at its
default; factors are second moments of samples whose spectra fall as 1 / rank in bases that the tasks partly share.
Compared are the method `kronecker` at several tolerances, `gram`, which has a closed form, and where a matrix of
(out in) rows fits, that matrix in float64 and a Cholesky factorisation of it. The reference is the dense solution, else
conjugate gradients in float64 at a tolerance of 1e-9. Times are processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaluation.speed.alternate import described, machine
from mergekit_bayes.merge.methods.gram import gram
from mergekit_bayes.merge.methods.kronecker import kronecker
from mergekit_bayes.merge.registry import Merge
from mergekit_bayes.posterior import Isotropic, Kronecker, Term

HERE = Path(__file__).parent
TASKS, SHRINKAGE, PRIOR, DENSE = 5, 0.1, 1e-2, 4096
TOLERANCES = (1e-2, 1e-4, 1e-6)
EXACT = 1e-9
"""Tolerance of the reference where a dense one does not fit."""


@dataclass(frozen=True)
class Layer:
    """What is merged: the base with its precision, the tasks' posteriors, and equal weights."""

    base: Isotropic
    prior: float
    sources: tuple[Kronecker, ...]
    weights: Tensor

    def to(self, dtype: torch.dtype) -> Layer:
        sources = tuple(source.to(dtype) for source in self.sources)
        return Layer(Isotropic(self.base.mean.to(dtype), self.prior), self.prior, sources, self.weights.to(dtype))

    @property
    def origin(self) -> Tensor:
        """Task arithmetic, where the solver starts; weights sum to one, so that it is the average."""
        return torch.stack([source.mean for source in self.sources]).mean(0)


def layer(out: int, inputs: int, *, seed: int = 0) -> Layer:
    """A random layer whose prior is a hundredth of the mean curvature."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(out, inputs, generator=generator) / inputs**0.5
    shared = {size: _basis(size, generator) for size in {out, inputs}}
    terms = [Term(_moment(shared[inputs], generator), _moment(shared[out], generator)) for _ in range(TASKS)]
    prior = PRIOR * statistics.mean(float(term.diagonal().mean()) for term in terms)
    means = [base + 0.1 * torch.randn(out, inputs, generator=generator) / inputs**0.5 for _ in terms]
    sources = [Kronecker(mean, torch.tensor(prior), (term,)) for mean, term in zip(means, terms, strict=True)]
    return Layer(Isotropic(base, prior), prior, tuple(sources), torch.full((TASKS,), 1 / TASKS))


def _basis(size: int, generator: torch.Generator) -> Tensor:
    basis: Tensor = torch.linalg.qr(torch.randn(size, size, generator=generator))[0]
    return basis


def _moment(shared: Tensor, generator: torch.Generator) -> Tensor:
    """Second moment of as many samples as directions, half of them along a shared basis, half along one of its own."""
    size = len(shared)
    scale = torch.arange(1, size + 1).rsqrt()
    count = -(-size // 2)
    parts = [
        torch.randn(count, size, generator=generator) * scale @ basis.mT for basis in (shared, _basis(size, generator))
    ]
    samples = torch.cat(parts)
    return samples.mT @ samples / len(samples)


def dense(given: Layer) -> Tensor:
    """The exact mean from S as one matrix of (out in) rows, in float64."""
    each = given.to(torch.float64)
    matrices = [_matrix(source.shrunk(SHRINKAGE)) for source in each.sources]
    total = torch.stack(matrices).mean(0)
    force = sum(matrix @ source.mean.flatten() for matrix, source in zip(matrices, each.sources, strict=True))
    assert isinstance(force, Tensor)
    solved = torch.cholesky_solve((force / TASKS)[:, None], torch.linalg.cholesky(total))
    return solved.view_as(given.base.mean)


def _matrix(posterior: Kronecker) -> Tensor:
    """S, acting on matrices row by row."""
    matrix = posterior.diagonal.expand_as(posterior.mean).flatten().diag()
    for term in posterior.terms:
        assert term.output is not None
        matrix = matrix + torch.kron(term.output, term.input)
    return matrix


def solved(given: Layer, tolerance: float) -> Merge:
    """The method `kronecker`."""
    return Merge.of(
        kronecker(
            given.base,
            given.sources,
            given.weights,
            shrinkage=SHRINKAGE,
            tolerance=tolerance,
            max_iterations=2000,
        )
    )


def measure(out: int, inputs: int, repeats: int) -> dict[str, Any]:
    """Errors and processor time of every way to merge one layer."""
    given = layer(out, inputs)
    small = out * inputs <= DENSE
    exact = dense(given) if small else solved(given.to(torch.float64), EXACT).posterior.mean
    ways: dict[str, Callable[[], Merge]] = {
        f"kronecker, {tolerance:g}": lambda tolerance=tolerance: solved(given, tolerance)  # type: ignore[misc]
        for tolerance in TOLERANCES
    }
    ways["gram"] = lambda: Merge.of(gram(given.base, given.sources, given.weights, shrinkage=SHRINKAGE))
    rows = {name: _row(given, way, exact, repeats) for name, way in ways.items()}
    if small:
        rows["dense, float64"] = {"seconds": [_timed(lambda: dense(given))[0] for _ in range(repeats)]}
    return {"out": out, "in": inputs, "reference": "dense" if small else f"float64, {EXACT:g}", "rows": rows}


def _row(given: Layer, way: Callable[[], Merge], exact: Tensor, repeats: int) -> dict[str, Any]:
    runs = [_timed(way) for _ in range(repeats)]
    merged = runs[0][1]
    return {
        "seconds": [seconds for seconds, _ in runs],
        **{name: merged.measures[name] for name in ("iterations", "residual") if name in merged.measures},
        **errors(given, merged.posterior.mean, exact),
    }


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    found = work()
    return time.process_time() - started, found


def errors(given: Layer, mean: Tensor, exact: Tensor) -> dict[str, float]:
    """How much of the correction to task arithmetic is missing: of its size, and of the predicted loss that it saves.

    The sources' predicted losses add up to a quadratic around the exact mean with the curvature S, so that a mean that
    is off by e loses e^T S e / 2 against it, where task arithmetic loses x^T S x / 2, x being the correction.
    """
    each = given.to(torch.float64)
    precise = [source.shrunk(SHRINKAGE) for source in each.sources]
    correction, left = exact.double() - each.origin, exact.double() - mean.double()

    def loss(x: Tensor) -> float:
        return statistics.mean(float(posterior.quadratic(x)) for posterior in precise)

    return {"of the weights": float(left.norm() / correction.norm()), "of the loss": loss(left) / loss(correction)}


def page(results: Mapping[str, Any]) -> str:
    """The results for people."""
    lines = [
        "# Merging one layer under Kronecker posteriors",
        "",
        described(results["machine"], results["load at end"]),
    ]
    lines += [f"{TASKS} tasks, float32. Errors are shares of the correction to task arithmetic; `gram` solves another"]
    lines += ["system, so that its error is what it leaves out and not how well it is solved."]
    for case in results["cases"]:
        lines += ["", f"## {case['out']} x {case['in']}", "", f"Reference: {case['reference']}.", ""]
        lines += ["| | CPU seconds | iterations | residual | error of the weights | of the predicted loss |"]
        lines += ["| --- | ---: | ---: | ---: | ---: | ---: |", *_table(case["rows"])]
    return "\n".join([*lines, "", f"`{results['command']}`, {results['date']}", ""])


def _table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    kinds = {"iterations": ".0f", "residual": ".1e", "of the weights": ".1e", "of the loss": ".1e"}
    lines = []
    for name, row in rows.items():
        cells = [f"{row[key]:{kind}}" if key in row else "" for key, kind in kinds.items()]
        lines.append(f"| {name} | {statistics.median(row['seconds']):.3g} | {' | '.join(cells)} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write results and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["64x64", "256x256", "768x768", "1536x1536"], help="OUTxIN")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for kronecker.json and kronecker.md")
    options = parser.parse_args(arguments)
    where, cases = machine("cpu"), []
    for size in options.sizes:
        out, _, inputs = size.partition("x")
        cases.append(measure(int(out), int(inputs), options.repeats))
        print(f"{size} done", flush=True)
    results = {
        "machine": where,
        "load at end": os.getloadavg()[0],
        "date": date.today().isoformat(),
        "command": "python -m evaluation.speed.kronecker"
        f" --sizes {' '.join(options.sizes)} --repeats {options.repeats}",
        "cases": cases,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kronecker.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "kronecker.md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
