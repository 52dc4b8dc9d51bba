"""A small model fine-tuned three times, as files and as the numbers a merge of them must give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_bayes.merge.run import MergeResult, merge
from tests.merge.builders import (
    random_precisions,
    random_tensors,
    read_precisions,
    read_tensors,
    write_checkpoint,
    write_precisions,
)
from tests.merge.truth import Truth, assert_one_rounding, merge_tensor

SHAPES: Mapping[str, tuple[int, ...]] = {
    "embed.weight": (6, 4),
    "layers.0.mlp.weight": (4, 3),
    "layers.0.norm.weight": (4,),
    "layers.1.mlp.weight": (4, 3),
    "layers.1.norm.weight": (4,),
    "layers.2.mlp.weight": (4, 3),
    "layers.2.norm.weight": (4,),
    "scale": (),
    "unused": (0, 5),
}
"""Three layers, a 0-d and an empty tensor."""

LAYER = {name: int(name[7]) / 2 if name.startswith("layers") else 0.0 for name in SHAPES}
"""Position of each tensor's layer, 0 to 1."""

WEIGHTS = (0.9, 0.6, 0.7)
REMOVAL = (1.0, 0.8, -0.3)


@dataclass(frozen=True)
class Problem:
    """Base and sources with their precisions at data scale; tensors as stored, prior shares included.

    Attributes:
        root: where the folders `base`, `one`, `two`, `three` lie.
        base: tensors of the base.
        sources: tensors of each source.
        precisions: sidecar of each source.
        shares: `prior_precision` of each sidecar.
        counts: `num_examples` of each sidecar.
        base_precision: sidecar of the base, or None.
    """

    root: Path
    base: Mapping[str, Tensor]
    sources: Sequence[Mapping[str, Tensor]]
    precisions: Sequence[Mapping[str, Tensor]]
    shares: Sequence[float]
    counts: Sequence[int]
    base_precision: Mapping[str, Tensor] | None = None
    names: tuple[str, ...] = field(default=("one", "two", "three"))

    def recipe(self, method: str, weights: Sequence[object] = WEIGHTS, **extra: object) -> dict[str, Any]:
        """A recipe of all sources; values in `extra` replace its keys."""
        models = [
            {"model": str(self.root / name), "parameters": {"weight": weight}}
            for name, weight in zip(self.names, weights, strict=True)
        ]
        recipe = {"merge_method": method, "base_model": str(self.root / "base"), "models": models, **extra}
        if method in ("linear", "hessian_weighted"):
            del recipe["base_model"]
        return recipe

    def merge(self, recipe: Mapping[str, Any]) -> MergeResult:
        """Run it into the folder `out`."""
        return merge(recipe, self.root / "out", threads=1)

    def label(self, index: int) -> str:
        """What report and messages call a source."""
        return str(self.root / self.names[index])


def write_problem(
    root: Path,
    *,
    dtype: torch.dtype = torch.float32,
    precision_dtype: torch.dtype = torch.float32,
    shares: Sequence[float] = (0.5, 0.5, 0.5),
    base_sidecar: bool = False,
    scale: float = 1.0,
) -> Problem:
    """Write base, sources (each a little way from the base) and their sidecars."""
    base = random_tensors(0, SHAPES, dtype=dtype, scale=scale)
    write_checkpoint(root / "base", base)
    base_precision = None
    if base_sidecar:
        base_precision = random_precisions(100, SHAPES, above=0.2, dtype=precision_dtype)
        write_precisions(root / "base", base_precision, num_examples=1000)
    sources, precisions, counts = [], [], (100, 250, 50)
    for seed, (name, share) in enumerate(zip(("one", "two", "three"), shares, strict=True), start=1):
        drift = random_tensors(seed, SHAPES, dtype=torch.float64, scale=0.3 * scale)
        sources.append({key: (base[key].double() + drift[key]).to(dtype) for key in SHAPES})
        write_checkpoint(root / name, sources[-1], shards=seed)
        own = random_precisions(100 + seed, SHAPES, above=1.25 * share, dtype=precision_dtype)
        if base_precision is not None and not share:
            own = {key: value + base_precision[key] for key, value in own.items()}
        precisions.append(own)
        facts = {"prior_precision": share or None, "num_examples": counts[seed - 1]}
        write_precisions(root / name, precisions[-1], base=root / "base", shards=seed, **facts)
    return Problem(root, base, sources, precisions, shares, counts, base_precision)


def truth(
    problem: Problem,
    method: str,
    weights_at: Mapping[str, Sequence[float]],
    *,
    prior: Mapping[str, Tensor] | float,
    precisions: Sequence[Mapping[str, Tensor | float]] | None = None,
    floor: float | None = None,
) -> dict[str, Truth]:
    """Every tensor by its oracle; `precisions` are those that enter the rule, by default the sidecars' own."""
    found = {}
    for name, mean in problem.base.items():
        used = [own[name] for own in (problem.precisions if precisions is None else precisions)]
        base = (mean, prior if isinstance(prior, float) else prior[name])
        means = [source[name] for source in problem.sources]
        found[name] = merge_tensor(method, base, list(zip(means, used, strict=True)), weights_at[name], floor=floor)
    return found


def everywhere(weights: Sequence[float]) -> dict[str, Sequence[float]]:
    """The same weights for every tensor."""
    return dict.fromkeys(SHAPES, weights)


def check_output(
    folder: Path,
    wanted: Mapping[str, Truth],
    *,
    dtype: torch.dtype = torch.float32,
    precision_dtype: torch.dtype | None = torch.float32,
    precision_factor: float = 1.0,
    compute: torch.dtype = torch.float32,
) -> None:
    """The folder holds the truth, rounded once; without `precision_dtype` it has no sidecar."""
    means = read_tensors(folder)
    assert sorted(means) == sorted(wanted)
    for name, value in wanted.items():
        assert means[name].dtype == dtype, name
        assert_one_rounding(means[name], value.mean, compute=compute)
    precisions = read_precisions(folder)
    assert sorted(precisions) == (sorted(wanted) if precision_dtype is not None else [])
    for name, precision in precisions.items():
        assert precision.dtype == precision_dtype, name
        assert_one_rounding(precision, wanted[name].precision * precision_factor, compute=compute)
