"""The theory's promise on real data: a richer posterior gives a merge closer to training on everything at once.

Tasks are parts of scikit-learn's data. Every source minimises its own loss plus the prior, its curvature is computed at
that minimum, and all are merged with weight one; joint training minimises the sum of the losses plus the prior once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits, load_linnerud, load_wine
from torch import Tensor
from torch.nn.functional import cross_entropy

from mergekit_bayes.merge.registry import Merge, get_method
from mergekit_bayes.posterior import Diagonal, Isotropic, Kronecker, Posterior, Term, merge_kronecker, merge_posteriors

Loss = Callable[[Sequence[Tensor]], Tensor]
LOADERS = {"diabetes": load_diabetes, "digits": load_digits, "linnerud": load_linnerud, "wine": load_wine}


class Part(NamedTuple):
    inputs: Tensor
    targets: Tensor


def _parts(name: str, split: str) -> list[Part]:
    """Three parts: at random, by class, or by thirds of the first feature; inputs standardised, with a constant."""
    inputs, targets = LOADERS[name](return_X_y=True)
    inputs = (inputs - inputs.mean(axis=0)) / (inputs.std(axis=0) + 1e-9)
    inputs = np.hstack([inputs, np.ones((len(inputs), 1))]) / np.sqrt(inputs.shape[1])
    if split == "class":
        part = targets % 3
    elif split == "thirds":
        part = np.digitize(inputs[:, 0], np.quantile(inputs[:, 0], [1 / 3, 2 / 3]))
    else:
        part = np.random.default_rng(0).integers(0, 3, len(inputs))
    return [Part(torch.tensor(inputs[part == k]), torch.tensor(targets[part == k])) for k in range(3)]


def _minimise(loss: Loss, start: Sequence[Tensor]) -> list[Tensor]:
    weights = [each.clone().requires_grad_() for each in start]
    optimizer = torch.optim.LBFGS(
        weights, max_iter=1000, tolerance_grad=1e-8, tolerance_change=1e-13, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(weights)
        value.backward()
        return value

    optimizer.step(closure)
    return [each.detach() for each in weights]


def _normal_equations(part: Part, outputs: Tensor, prior: float, base: Tensor) -> Tensor:
    """The minimum of 1/2 sum (y - W x)^T G (y - W x) + prior/2 |W - base|^2, by one dense solve."""
    second = part.inputs.T @ part.inputs
    targets = part.targets.double().reshape(len(part.inputs), -1)
    matrix = torch.kron(outputs, second) + prior * torch.eye(base.numel(), dtype=torch.float64)
    force = outputs @ targets.T @ part.inputs + prior * base
    return torch.linalg.solve(matrix, force.flatten()).reshape(base.shape)


@pytest.mark.parametrize("name", ["diabetes", "linnerud"])
@pytest.mark.parametrize("method", ["gram", "kronecker", "posterior"])
def test_input_curvature_is_exact_for_linear_regression(method: str, name: str) -> None:
    parts, prior = _parts(name, "random"), 0.3
    outputs = torch.eye(3 if name == "linnerud" else 1, dtype=torch.float64)
    base = torch.full((len(outputs), parts[0].inputs.shape[1]), 0.5, dtype=torch.float64)
    sources = [
        Kronecker(_normal_equations(each, outputs, prior, base), base.new_tensor(prior), [_inputs(each)])
        for each in parts
    ]
    options = {} if method == "posterior" else {"shrinkage": 0.0}
    kernel = get_method(method).kernel
    merged = Merge.of(kernel(Isotropic(base, prior), sources, torch.ones(3, dtype=torch.float64), **options)).posterior
    together = Part(torch.cat([each.inputs for each in parts]), torch.cat([each.targets for each in parts]))
    wanted = _normal_equations(together, outputs, prior, base)
    assert (merged.mean - wanted).abs().max() <= 1e-8 * wanted.abs().max()


def _inputs(part: Part) -> Term:
    return Term(part.inputs.T @ part.inputs, None)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 0.2, 0.3), (1.0, 2.0, -0.001)])
def test_kronecker_factors_are_exact_for_weighted_linear_regression(weights: tuple[float, ...]) -> None:
    """Every task weighs its outputs by a matrix of its own; the whole is one dense system of 650 equations."""
    parts, prior = _parts("digits", "class"), 0.7
    parts = [part._replace(targets=torch.eye(10, dtype=torch.float64)[part.targets]) for part in parts]
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(10, parts[0].inputs.shape[1], generator=generator, dtype=torch.float64) / 10
    roots = [torch.randn(10, 10, generator=generator, dtype=torch.float64) for _ in parts]
    outputs = [root @ root.T for root in roots]
    sources = [
        Kronecker(
            _normal_equations(part, weighting, prior, base),
            base.new_tensor(prior),
            [Term(part.inputs.T @ part.inputs / len(part.inputs), len(part.inputs) * weighting)],
        )
        for part, weighting in zip(parts, outputs, strict=True)
    ]
    alpha = torch.tensor(weights, dtype=torch.float64)
    merged, solution = merge_kronecker(Isotropic(base, prior), sources, alpha, tolerance=1e-11)
    matrix, force = prior * torch.eye(base.numel(), dtype=torch.float64), prior * base
    for part, weighting, weight in zip(parts, outputs, weights, strict=True):
        matrix = matrix + weight * torch.kron(weighting, part.inputs.T @ part.inputs)
        force = force + weight * weighting @ part.targets.T @ part.inputs
    wanted = torch.linalg.solve(matrix, force.flatten()).reshape(base.shape)
    assert solution.converged
    assert (merged.mean - wanted).abs().max() <= 1e-8 * wanted.abs().max()


def _softmax_posteriors(part: Part, weights: Tensor, prior: float) -> dict[str, Posterior]:
    """The exact curvature of softmax regression, cut to each family: mean, diagonal, and G (x) A."""
    chances = (part.inputs @ weights.T).softmax(dim=1)
    diagonal = (chances * (1 - chances)).T @ part.inputs.square()
    factors = Term(part.inputs.T @ part.inputs / len(part.inputs), chances.sum(dim=0).diag() - chances.T @ chances)
    return {
        "isotropic": Isotropic(weights, prior + float(diagonal.mean())),
        "diagonal": Diagonal(weights, prior + diagonal),
        "kronecker": Kronecker(weights, weights.new_tensor(prior), [factors]),
    }


@pytest.mark.parametrize(
    ("name", "split", "prior"),
    [("digits", "class", 1.0), ("digits", "random", 1.0), ("wine", "class", 1.0), ("wine", "thirds", 0.1)],
)
def test_a_richer_family_is_closer_to_joint_training_of_logistic_models(name: str, split: str, prior: float) -> None:
    parts = _parts(name, split)
    classes = 1 + int(max(part.targets.max() for part in parts))
    base = torch.zeros(classes, parts[0].inputs.shape[1], dtype=torch.float64)

    def loss(chosen: Sequence[Part], weights: Sequence[Tensor]) -> Tensor:
        data = [cross_entropy(part.inputs @ weights[0].T, part.targets, reduction="sum") for part in chosen]
        return torch.stack(data).sum() + prior / 2 * (weights[0] - base).square().sum()

    experts = [_minimise(lambda weights, part=part: loss([part], weights), [base])[0] for part in parts]  # type: ignore[misc]
    (joint,) = _minimise(lambda weights: loss(parts, weights), [base])
    sources = [_softmax_posteriors(part, expert, prior) for part, expert in zip(parts, experts, strict=True)]
    excess, distance = {}, {}
    for family in ("isotropic", "diagonal", "kronecker"):
        merged = merge_posteriors(
            Isotropic(base, prior), [each[family] for each in sources], torch.ones(3, dtype=torch.float64)
        )
        excess[family] = float(loss(parts, [merged.mean]) - loss(parts, [joint]))
        distance[family] = float((merged.mean - joint).norm())
    assert 0 < excess["kronecker"] < excess["diagonal"] < excess["isotropic"]
    assert distance["kronecker"] < distance["isotropic"]


HIDDEN = 12


def _linear_posteriors(part: Part, first: Tensor, second: Tensor, prior: float) -> list[dict[str, Posterior]]:
    """The Gauss-Newton curvature of both layers of y = W_2 W_1 x, for which Kronecker products are exact."""
    count, hidden = len(part.inputs), part.inputs @ first.T
    factors = (
        (first, part.inputs.T @ part.inputs / count, count * second.T @ second),
        (second, hidden.T @ hidden / count, count * torch.eye(10, dtype=torch.float64)),
    )
    found: list[dict[str, Posterior]] = []
    for weights, inner, outer in factors:
        diagonal = outer.diagonal()[:, None] * inner.diagonal()
        found.append(
            {
                "isotropic": Isotropic(weights, prior + float(diagonal.mean())),
                "diagonal": Diagonal(weights, prior + diagonal),
                "kronecker": Kronecker(weights, weights.new_tensor(prior), [Term(inner, outer)]),
            }
        )
    return found


@pytest.mark.parametrize("split", ["class", "random"])
def test_a_richer_family_is_closer_to_joint_training_of_deep_linear_models(split: str) -> None:
    """Two layers, fine-tuned from weights that were trained on a few examples of everything."""
    parts, prior = _parts("digits", split), 10.0
    parts = [Part(part.inputs, torch.eye(10, dtype=torch.float64)[part.targets]) for part in parts]
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) / 4 for shape in ((HIDDEN, 65), (10, HIDDEN))]

    def loss(chosen: Sequence[Part], weights: Sequence[Tensor], origin: Sequence[Tensor]) -> Tensor:
        data = [(part.targets - part.inputs @ weights[0].T @ weights[1].T).square().sum() / 2 for part in chosen]
        anchors = [(each - there).square().sum() for each, there in zip(weights, origin, strict=True)]
        return torch.stack(data).sum() + prior / 2 * torch.stack(anchors).sum()

    few = [Part(part.inputs[:20], part.targets[:20]) for part in parts]
    base = _minimise(lambda weights: loss(few, weights, start), start)
    experts = [_minimise(lambda weights, part=part: loss([part], weights, base), base) for part in parts]  # type: ignore[misc]
    joint = _minimise(lambda weights: loss(parts, weights, base), base)
    sources = [_linear_posteriors(part, *expert, prior) for part, expert in zip(parts, experts, strict=True)]
    excess = {}
    for family in ("isotropic", "diagonal", "kronecker"):
        merged = [
            merge_posteriors(
                Isotropic(origin, prior), [each[layer][family] for each in sources], torch.ones(3, dtype=torch.float64)
            ).mean
            for layer, origin in enumerate(base)
        ]
        excess[family] = float(loss(parts, merged, base) - loss(parts, joint, base))
    assert 0 < excess["kronecker"] < excess["diagonal"] < excess["isotropic"]
