"""Adapters with precisions of their factors, as files and as the float64 posteriors of dW they stand for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_bayes.merge.run import MergeResult, merge
from tests.merge.builders import (
    factor_names,
    random_precisions,
    random_tensors,
    read_precisions,
    read_tensors,
    write_adapter,
    write_checkpoint,
    write_precisions,
)
from tests.merge.truth import Truth, lora_precision, lora_update, merge_tensor

SHAPES: Mapping[str, tuple[int, int]] = {"layers.0.up": (7, 5), "layers.0.down": (5, 7), "layers.1.up": (7, 5)}
"""Rows and columns of dW by module."""

PRIOR = 0.02
"""S_0 of dW: smaller than nearly every precision of dW below."""

Posterior = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Source:
    """One adapter.

    Attributes:
        folder: where it lies.
        factors: A and B by module, as stored.
        precisions: their precisions as stored, by module.
        scaling: s in dW = s B A.
    """

    folder: Path
    factors: Mapping[str, tuple[Tensor, Tensor]]
    precisions: Mapping[str, tuple[Tensor, Tensor]]
    scaling: float

    @property
    def raw_precisions(self) -> dict[str, Tensor]:
        """The sidecar's tensors."""
        pairs = self.precisions.items()
        return {name: part for module, pair in pairs for name, part in zip(factor_names(module), pair, strict=True)}

    def update(self, module: str) -> Tensor:
        """The dW of a module."""
        return lora_update(*self.factors[module], self.scaling)

    def posterior(self, module: str) -> Posterior:
        """Mean and precision of dW, entry by entry."""
        spread = lora_precision(*self.factors[module], *self.precisions[module], self.scaling)
        return self.update(module), spread


@dataclass(frozen=True)
class Make:
    """What to write: rank, scaling, modules, and the facts of the sidecar (None: no sidecar)."""

    rank: int = 2
    scaling: float = 1.0
    modules: Sequence[str] = tuple(SHAPES)
    facts: Mapping[str, Any] | None = field(default_factory=dict)
    size: float = 1.0


def write_source(
    folder: Path, seed: int, make: Make = Make(), *, shapes: Mapping[str, tuple[int, int]] = SHAPES
) -> Source:
    """Write an adapter and its sidecar."""
    factors, precisions = {}, {}
    for index, module in enumerate(make.modules):
        rows, columns = shapes[module]
        sizes = {"a": (make.rank, columns), "b": (rows, make.rank)}
        drawn = random_tensors(100 * seed + index, sizes, scale=make.size)
        known = random_precisions(100 * seed + index + 50, sizes, above=1.0)
        factors[module], precisions[module] = (drawn["a"], drawn["b"]), (known["a"], known["b"])
    write_adapter(folder, factors, alpha=make.scaling * make.rank)
    source = Source(folder, factors, precisions, make.scaling)
    if make.facts is not None:
        write_precisions(folder, source.raw_precisions, **make.facts)
    return source


def write_sources(root: Path, *makes: Make) -> list[Source]:
    """Adapters `one`, `two`, ... in a folder."""
    names = ("one", "two", "three", "four")
    return [write_source(root / name, seed, make) for seed, (name, make) in enumerate(zip(names, makes, strict=False))]


def merge_sources(
    method: str, sources: Sequence[Source], weights: Sequence[float], out: Path, *, threads: int = 1, **recipe: Any
) -> MergeResult:
    """Merge adapters, in float64 unless `recipe` says otherwise; no base is read, `task_arithmetic` excepted."""
    models = [{"model": str(s.folder), "parameters": {"weight": w}} for s, w in zip(sources, weights, strict=True)]
    content = {"merge_method": method, "models": models, "dtype": "float64", **recipe}
    if method in ("gradient_matching", "posterior", "task_arithmetic"):
        content.setdefault("base_model", str(write_base(sources[0].folder.parent / "base")))
    if method in ("gradient_matching", "posterior"):
        content.setdefault("precision", {"prior": PRIOR})
    return merge(content, out, threads=threads)


def write_base(folder: Path) -> Path:
    """A checkpoint with a weight for every module, unless it is there."""
    if not folder.exists():
        write_checkpoint(folder, random_tensors(0, {f"{name}.weight": shape for name, shape in SHAPES.items()}))
    return folder


def merged_update(folder: Path, module: str) -> Tensor:
    """The dW of a merged adapter, in float64."""
    tensors = read_tensors(folder, "adapter_model")
    a, b = (tensors[name].double() for name in factor_names(module))
    return b @ a


def merged_variance(folder: Path, module: str) -> Tensor:
    """The variance of dW that the factors of a merged adapter and its sidecar stand for."""
    tensors, precisions = read_tensors(folder, "adapter_model"), read_precisions(folder)
    names = factor_names(module)
    return 1 / lora_precision(*(tensors[name] for name in names), *(precisions[name] for name in names), 1.0)


def data_precision(
    factors: tuple[Tensor, Tensor], precisions: tuple[Tensor, Tensor], prior: float, *, trained: float, scaling: float
) -> Tensor:
    """What the data added to the precision of dW, entry by entry: 1/Var - 1/Var of factors that know the prior only.

    Args:
        factors: A and B as stored.
        precisions: of A and B as stored, `prior` included.
        prior: the prior precision of A and of B.
        trained: the scaling that B's prior refers to.
        scaling: s in dW = s B A.
    """
    a, b = (factor.double() for factor in factors)
    prior_b = prior * (scaling / trained) ** 2
    uninformed = (torch.full_like(a, prior), torch.full_like(b, prior_b))
    return lora_precision(a, b, *precisions, scaling) - lora_precision(a, b, *uninformed, scaling)


def truth(
    method: str, sources: Sequence[Posterior | None], weights: Sequence[float], *, floor: float | None = None
) -> Truth:
    """The oracle of a method on dW; None is a source that leaves the module alone."""
    shape = next(source[0].shape for source in sources if source is not None)
    prior = (torch.zeros(shape, dtype=torch.float64), PRIOR)
    if method == "hessian_weighted":
        pairs = [(source, weight) for source, weight in zip(sources, weights, strict=True) if source is not None]
        return merge_tensor(method, prior, [p[0] for p in pairs], [p[1] for p in pairs], floor=floor)
    return merge_tensor(method, prior, [prior if s is None else s for s in sources], weights, floor=floor)


def lost_energy(update: Tensor, rank: int) -> float:
    """Share of the squared norm that the best approximation of this rank leaves out."""
    squares = torch.linalg.svdvals(update).square()
    return float(squares[rank:].sum() / squares.sum())


def assert_close(seen: Tensor, wanted: Tensor, tolerance: float = 1e-10) -> None:
    """Equal, give or take `tolerance` times the largest entry that is wanted."""
    torch.testing.assert_close(seen.double(), wanted.double(), rtol=0, atol=tolerance * float(wanted.abs().max()))


def assert_cheap(seen: Tensor, wanted: Truth, rank: int, tolerance: float = 1e-10) -> float:
    """The mean in that rank, at no more predicted loss than its truncated singular value decomposition.

    Args:
        seen: the update that was written.
        wanted: mean and precision of the merged update.
        rank: largest rank that was allowed.
        tolerance: relative error of the arithmetic.

    Returns:
        The predicted loss of what was seen.
    """
    sigma = torch.linalg.svdvals(seen.double())
    assert bool((sigma[rank:] <= tolerance * sigma[0]).all()), "no larger rank"
    plain = truncated(wanted.mean, rank)
    if rank >= min(wanted.mean.shape):
        assert_close(seen, plain, tolerance)
    size = predicted_loss(torch.zeros_like(wanted.mean), wanted)
    loss = predicted_loss(seen, wanted)
    assert loss <= predicted_loss(plain, wanted) + tolerance * size
    return loss


def truncated(update: Tensor, rank: int) -> Tensor:
    """The best approximation of this rank in the Frobenius norm."""
    u, sigma, vh = torch.linalg.svd(update, full_matrices=False)
    return (u[:, :rank] * sigma[:rank]) @ vh[:rank]


def predicted_loss(update: Tensor, wanted: Truth) -> float:
    """What an update costs that is not the mean, by the posterior: 1/2 sum S (X - W)^2."""
    return float(0.5 * (wanted.precision * (update.double() - wanted.mean).square()).sum())
