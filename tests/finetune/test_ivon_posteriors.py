"""Posteriors that are known exactly: what the optimizer learns, what updates, merges and removals of it give.

Regressions are trained in many copies at once, one row of a parameter each: the noise of the estimates averages out.
Inputs are multiples of unit vectors, so that the posterior of any part of the data factorizes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from mergekit_bayes import IVON, Diagonal, merge_posteriors
from mergekit_bayes.finetune import export_precision

COPIES, NOISE, PRIOR = 400, 0.25, 4.0
"""Copies of a regression, variance of its targets, prior precision of its weights."""

Data = tuple[Tensor, Tensor]
Gradient = Callable[[Tensor], Tensor]


def regression(examples: int = 64, weights: int = 4) -> Data:
    generator = torch.Generator().manual_seed(0)
    x = torch.zeros(examples, weights)
    x[torch.arange(examples), torch.arange(examples) % weights] = 0.5 + torch.rand(examples, generator=generator)
    truth = torch.tensor([1.0, -1.0, 0.5, 0.0])
    return x, x @ truth + NOISE**0.5 * torch.randn(examples, generator=generator)


def exact(x: Tensor, y: Tensor, *, mean: Tensor | float = 0.0, precision: Tensor | float = PRIOR) -> Diagonal:
    """The posterior of the weights after some data, from a prior."""
    x, y = x.double(), y.double()
    posterior = (x**2).sum(0) / NOISE + precision
    return Diagonal(((x.T @ y) / NOISE + precision * mean) / posterior, posterior)


def gradient_of(x: Tensor, y: Tensor) -> Gradient:
    """Of the mean loss over the examples, for every copy."""
    return lambda theta: (theta @ x.T - y) @ x / NOISE / len(x)


def learn(gradient: Gradient, weights: int, examples: int, *, weight_decay: float, steps: int = 900) -> Diagonal:
    """Train all copies; mean and precision, averaged over copies and the last steps."""
    parameter = nn.Parameter(torch.zeros(COPIES, weights))
    optimizer = IVON([parameter], 0.05, examples, 1.0, beta2=0.99, weight_decay=weight_decay, rescale_lr=False, seed=1)
    means, precisions = [], []
    for step in range(steps):
        with optimizer.sampled_params(train=True):
            parameter.grad = gradient(parameter.detach())
        optimizer.step()
        if step >= steps * 2 // 3:
            means.append(parameter.detach().mean(0))
            exported = export_precision(optimizer, [("weights", parameter)], num_examples=examples)
            precisions.append(exported.precisions["weights"].mean(0))
    return Diagonal(torch.stack(means).double().mean(0), torch.stack(precisions).double().mean(0))


def near(learned: Diagonal, expected: Diagonal, *, share: float = 0.02, deviations: float = 0.05) -> None:
    """Precision within a share of itself, mean within some standard deviations of the posterior."""
    precision = expected.precision_tensor()
    torch.testing.assert_close(learned.precision_tensor(), precision, rtol=share, atol=0)
    assert ((learned.mean - expected.mean).abs() * precision.sqrt()).max() < deviations


def prior() -> Diagonal:
    return Diagonal(torch.zeros(4, dtype=torch.float64), torch.full((4,), PRIOR, dtype=torch.float64))


def merged(base: Diagonal, sources: list[Diagonal], weights: list[float]) -> Diagonal:
    result = merge_posteriors(base, sources, torch.tensor(weights, dtype=torch.float64))
    assert isinstance(result, Diagonal)
    return result


def test_10_the_posterior_of_linear_regression_is_learned() -> None:
    x, y = regression()
    near(learn(gradient_of(x, y), 4, len(x), weight_decay=PRIOR / len(x)), exact(x, y))


def test_10_learning_the_second_half_from_the_first_posterior_gives_the_joint_posterior() -> None:
    """Variational continual learning: the posterior of the first half is the prior of the second."""
    x, y = regression()
    first = learn(gradient_of(x[:32], y[:32]), 4, 32, weight_decay=PRIOR / 32)
    data, mean, precision = gradient_of(x[32:], y[32:]), first.mean.float(), first.precision_tensor().float()
    second = learn(lambda theta: data(theta) + precision * (theta - mean) / 32, 4, 32, weight_decay=0.0)
    near(second, exact(x, y), share=0.03)  # 1% of each is the known excess, (1 - beta2) ess E[g^2] / 2
    # the same in exact arithmetic, and as a merge
    known = exact(x[:32], y[:32])
    onward = exact(x[32:], y[32:], mean=known.mean, precision=known.precision_tensor())
    for posterior in (onward, merged(prior(), [known, exact(x[32:], y[32:])], [1.0, 1.0])):
        near(posterior, exact(x, y), share=1e-12, deviations=1e-12)


def test_10_a_merge_of_two_halves_at_weight_one_is_the_joint_posterior() -> None:
    x, y = regression()
    halves = [
        learn(gradient_of(x[half], y[half]), 4, 32, weight_decay=PRIOR / 32) for half in (slice(32), slice(32, 64))
    ]
    near(merged(prior(), halves, [1.0, 1.0]), exact(x, y))


def test_10_removing_data_is_the_exact_downdate() -> None:
    """The memory-perturbation equation: natural parameters of what is removed are subtracted."""
    x, y = regression()
    whole = learn(gradient_of(x, y), 4, len(x), weight_decay=PRIOR / len(x))
    one = exact(x[5:6], y[5:6])
    rest = torch.arange(64) != 5
    near(merged(prior(), [whole, one], [1.0, -1.0]), exact(x[rest], y[rest]), share=0.025)
    near(merged(prior(), [exact(x, y), one], [1.0, -1.0]), exact(x[rest], y[rest]), share=1e-12, deviations=1e-12)
    half = merged(prior(), [whole, exact(x[32:], y[32:])], [1.0, -1.0])
    near(half, exact(x[:32], y[:32]), share=0.04, deviations=0.1)


def logistic(examples: int = 120, weights: int = 3) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(3)
    x = generator.normal(size=(examples, weights))
    chance = 1 / (1 + np.exp(-x @ np.array([1.0, -0.5, 0.0])))
    return x, (generator.random(examples) < chance).astype(float)


def exact_logistic(x: np.ndarray, y: np.ndarray) -> Diagonal:
    """The best factorized Gaussian: E_q[gradient] = 0 and S = E_q[second derivative], by Gauss-Hermite quadrature."""
    nodes, quadrature = np.polynomial.hermite_e.hermegauss(60)
    quadrature = quadrature / quadrature.sum()
    mean, precision = np.zeros(x.shape[1]), np.full(x.shape[1], PRIOR)
    for _ in range(500):
        logits = (x @ mean)[:, None] + np.sqrt((x**2) @ (1 / precision))[:, None] * nodes
        chance = 1 / (1 + np.exp(-logits))
        slope = x.T @ (chance @ quadrature - y) + PRIOR * mean
        precision = (x**2).T @ ((chance * (1 - chance)) @ quadrature) + PRIOR
        mean = mean - 0.3 * slope / precision
    assert np.abs(slope).max() < 1e-9
    return Diagonal(torch.tensor(mean), torch.tensor(precision))


def test_10_the_posterior_of_logistic_regression_is_learned() -> None:
    x, y = logistic()
    inputs, targets = torch.tensor(x).float(), torch.tensor(y).float()

    def gradient(theta: Tensor) -> Tensor:
        return (torch.sigmoid(theta @ inputs.T) - targets) @ inputs / len(targets)

    learned = learn(gradient, 3, len(y), weight_decay=PRIOR / len(y), steps=1500)
    near(learned, exact_logistic(x, y), share=0.025)
