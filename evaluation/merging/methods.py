"""The methods of the study: which registered kernel merges a tensor, with which posteriors, and the one knob it has.

Every knob is tried on the tuning data, scales at five values and priors at four. Scales multiply the merged task vector
(`task_arithmetic`: the weight of every task). A `prior` is a multiple of the curvature of the mean loss, averaged over
all entries and tasks, that is added to every entry; for methods with a prior in the rule it is S_0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mergekit_bayes.merge.registry import Merge, get_method
from mergekit_bayes.posterior import Diagonal, Isotropic, Kronecker, Mixture, Posterior, Term

Curvature = Mapping[str, Tensor]
Knob = Literal["none", "weight", "prior", "scale", "lambda"]

PRIORS = (1e-6, 1e-4, 1e-2, 1.0)
QUICK: Mapping[str, object] = {"tolerance": 1e-2}  # half of the iterations, for a correction that is off by 1%


@dataclass(frozen=True)
class Method:
    """One row of the tables.

    Attributes:
        kernel: name in the registry of merge methods.
        knob: what is tuned.
        tries: its values; one where nothing is tuned.
        weight: of every task; None for 1 / tasks.
        estimators: of the curvatures; of a tensor that several describe, the last one's counts.
        options: parameters of the kernel, besides the knob.
        components: checkpoints of each task's training that enter.
    """

    kernel: str
    knob: Knob = "none"
    tries: tuple[float, ...] = (0.0,)
    weight: float | None = 1.0
    estimators: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    components: tuple[str, ...] = ("final",)


METHODS: Mapping[str, Method] = {
    "linear": Method("linear", weight=None),
    "task arithmetic, 1.0": Method("task_arithmetic"),
    "task arithmetic, tuned": Method("task_arithmetic", "weight", (0.05, 0.1, 0.2, 0.3, 0.5)),
    "ties": Method("ties", "lambda", (0.1, 0.2, 0.4, 0.7, 1.0), options={"density": 0.2}),
    "tsv_m": Method("tsv_m", "scale", (0.1, 0.2, 0.3, 0.5, 1.0)),
    "iso_c": Method("iso_c", "scale", (0.1, 0.25, 0.5, 0.75, 1.0)),
    "hessian_weighted": Method("hessian_weighted", "prior", PRIORS, None, ("fisher",)),
    "gradient_matching": Method("gradient_matching", "prior", PRIORS, 1.0, ("fisher",)),
    "mixture": Method("mixture", "prior", PRIORS, None, ("fisher",), components=("half", "final")),
    "gram": Method("gram", "prior", PRIORS, None, ("gram",)),
    "gram, fisher elsewhere": Method("gram", "prior", PRIORS, None, ("fisher", "gram")),
    "kronecker": Method("kronecker", "prior", PRIORS, None, ("kfac",), QUICK),
    "kronecker, 1.0": Method("kronecker", "prior", PRIORS, 1.0, ("kfac",), QUICK),
}

LEFT_OUT: Mapping[str, tuple[str, ...]] = {"packages": ("kronecker, 1.0",), "lora": ("gram, fisher elsewhere",)}
"""Rows that a family or way of training goes without: solving for matrices of 1536 by 384 takes minutes each time, and
adapters leave all else alone."""


@dataclass(frozen=True)
class Source:
    """One component of one task: its tensors and the curvature of its mean loss."""

    means: Mapping[str, Tensor]
    curvature: Curvature | None


def merge(
    method: Method,
    knob: float,
    base: Mapping[str, Tensor],
    tasks: Sequence[Sequence[Source]],
    *,
    weights: Sequence[float] | None = None,
) -> dict[str, Tensor]:
    """Merge every tensor by its kernel.

    Args:
        method: a row of the tables.
        knob: a value of what it tunes.
        base: tensors by name.
        tasks: components of every task.
        weights: one per task, in place of the method's own.

    Returns:
        The merged tensors by name.
    """
    prior = knob * mean_curvature(base, tasks) if method.knob == "prior" else 1.0
    if weights is None:
        weight = knob if method.knob == "weight" else method.weight
        weights = [1 / len(tasks) if weight is None else weight] * len(tasks)
    options = dict(method.options)
    if method.knob in ("scale", "lambda"):
        options[method.knob] = knob
    merged = {}
    for name, value in base.items():
        posteriors = _posteriors(method, name, prior, tasks)
        merged[name] = run_kernel(method.kernel, Isotropic(value, prior), posteriors, weights, options)
    return merged


def _posteriors(method: Method, name: str, prior: float, tasks: Sequence[Sequence[Source]]) -> list[Posterior]:
    sources = [[_posterior(source, name, prior) for source in task] for task in tasks]
    return [task[0] if len(method.components) == 1 else mixed(task) for task in sources]


def run_kernel(
    name: str, base: Posterior, sources: Sequence[Posterior], weights: Sequence[float], options: Mapping[str, object]
) -> Tensor:
    """The mean that a registered method gives one tensor."""
    method = get_method(name)
    effective = torch.tensor(method.effective_weights(list(weights), options))
    merged = Merge.of(method.kernel(base, sources, effective, **method.kernel_options(options))).posterior.mean
    if not torch.isfinite(merged).all():
        raise SystemExit(f"{name}: the merge is not finite")
    return merged


def methods_of(family: str, mode: str) -> dict[str, Method]:
    """The rows of a family and way of training."""
    left_out = {*LEFT_OUT.get(family, ()), *LEFT_OUT.get(mode, ())}
    return {name: method for name, method in METHODS.items() if name not in left_out}


def mixed(components: Sequence[Posterior]) -> Posterior:
    """Components of one task, equally likely."""
    return Mixture(components)


def _posterior(source: Source, name: str, prior: float) -> Posterior:
    mean = source.means[name]
    if source.curvature is None:
        return Isotropic(mean, prior)
    term = term_of(source.curvature, name)
    if term is not None:
        return Kronecker(mean, mean.new_tensor(prior), (term,))
    if name in source.curvature:
        return Diagonal(mean, source.curvature[name] + prior)
    return Isotropic(mean, prior)


def term_of(curvature: Curvature, name: str) -> Term | None:
    """The Kronecker term of a weight, if it has one."""
    if f"{name}.input_factor" not in curvature:
        return None
    parts = [curvature.get(f"{name}.{part}") for part in ("input_factor", "output_factor", "eigenvalues")]
    first, *others = [None if part is None else part[0] for part in parts]
    assert first is not None
    return Term(first, *others)


def mean_curvature(base: Mapping[str, Tensor], tasks: Sequence[Sequence[Source]]) -> float:
    """The diagonal of the curvature, averaged over the entries that have one, components and tasks."""
    total, entries = 0.0, 0
    for source in (each for task in tasks for each in task):
        for name, tensor in base.items():
            diagonal = _diagonal(source.curvature or {}, name)
            if diagonal is not None:
                total += float(diagonal.double().mean()) * tensor.numel()
                entries += tensor.numel()
    return total / entries if entries else 0.0


def _diagonal(curvature: Curvature, name: str) -> Tensor | None:
    term = term_of(curvature, name)
    return curvature.get(name) if term is None else term.diagonal()
