r"""Mixtures of Gaussians: several posteriors of one task, from other seeds, epochs or people.

    q(w) = sum_k pi_k q_k(w)

A single Gaussian has to cover all solutions of a task at once; a mixture keeps them apart, and lets a merge lean on
those that suit the other tasks (the richest family of Monzón Maldonado et al., arXiv 2412.08147).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NoReturn, Self, final

from mergekit_bayes.errors import MethodError, NonPositivePrecisionError, NumericalError
from mergekit_bayes.posterior.family import Posterior, check_alike

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Mixture"]


@final
@dataclass(frozen=True, eq=False, init=False, repr=False)
class Mixture(Posterior):
    r"""q(w) = sum_k pi_k q_k(w) with Gaussian components.

    Args:
        components: at least one posterior of a poorer family, all of the same tensor.
        log_weights: log pi_k up to a common constant, one number per component; None weights all alike.

    Raises:
        MethodError: no component, a mixture among them, or not one finite weight each.
        ShapeMismatchError: components of different tensors.
        NonFiniteError, NonPositivePrecisionError: values that no component can have.
    """

    mean: Tensor
    components: tuple[Posterior, ...]
    log_weights: tuple[float, ...]
    family: ClassVar[str] = "mixture"
    richness: ClassVar[int] = 3

    def __init__(self, components: Iterable[Posterior], log_weights: Sequence[float] | None = None) -> None:
        self._set(components, log_weights)
        self.check()

    @classmethod
    def unchecked(cls, components: Iterable[Posterior], log_weights: Sequence[float] | None = None) -> Self:
        """Build a mixture of components whose values the caller has checked, or will check.

        Raises:
            MethodError, ShapeMismatchError: as the constructor.
        """
        mixture = object.__new__(cls)
        mixture._set(components, log_weights)
        return mixture

    def _set(self, components: Iterable[Posterior], log_weights: Sequence[float] | None) -> None:
        components = tuple(components)
        logs = tuple(float(each) for each in log_weights) if log_weights is not None else (0.0,) * len(components)
        if not components or len(logs) != len(components) or not all(math.isfinite(each) for each in logs):
            raise MethodError(
                f"mixture of {len(components)} components with log-weights {logs}: one finite number each"
            )
        if any(each.richness >= self.richness for each in components):
            raise MethodError("mixture: a component is itself of the richest family; give its components instead")
        check_alike(components)
        total = _log_sum(logs)
        object.__setattr__(self, "components", components)
        object.__setattr__(self, "log_weights", tuple(each - total for each in logs))
        object.__setattr__(self, "mean", self._weighted([each.mean for each in components]))

    def _weighted(self, tensors: Sequence[Tensor]) -> Tensor:
        """The sum of pi_k x_k, as corrections of the first."""
        if len(tensors) == 1:
            return tensors[0]
        total = tensors[0].clone()
        for tensor, log_weight in zip(tensors[1:], self.log_weights[1:], strict=True):
            total.add_((tensor - tensors[0]).mul_(math.exp(log_weight)))
        return total

    def __repr__(self) -> str:
        return f"Mixture({len(self.components)} of {self.components[0]!r})"

    def responsibilities(self, x: Tensor, *, temperature: float) -> tuple[float, ...]:
        r"""The share of each component at x, proportional to pi_k q_k(x)^(1/temperature); they sum to one.

        Args:
            x: a point, of the mean's shape.
            temperature: positive; the number of entries of x compares log-densities per entry.

        Raises:
            MethodError: the density of a component cannot be computed; see `Kronecker.log_density`.
        """
        logs = [float(each.log_density(x)) for each in self.components]
        return shares(self.log_weights, logs, temperature)

    def precision_tensor(self) -> Tensor:
        """The weighted average of the components' precision tensors."""
        return self._weighted([each.precision_tensor().expand_as(self.mean) for each in self.components])

    def quadratic(self, x: Tensor, *, beyond: Posterior | None = None) -> Tensor:
        """The weighted average over the components of x^T (S_k - S_beyond) x; see `Posterior.quadratic`."""
        return self._weighted([each.quadratic(x, beyond=beyond) for each in self.components])

    def with_mean(self, mean: Tensor) -> Self:
        """The same mixture moved so that its mean is another; see `Posterior.with_mean`."""
        shift = mean - self.mean
        return self.unchecked([each.with_mean(each.mean + shift) for each in self.components], self.log_weights)

    def admit(self, poorer: Posterior) -> Mixture:
        """A posterior of a poorer family as a mixture of one; see `Posterior.admit`."""
        return poorer if isinstance(poorer, Mixture) else Mixture.unchecked([poorer])

    def check(self) -> Self:
        """Check every component and return the mixture itself; see `Posterior.check`."""
        for component in self.components:
            component.check()
        return self

    def product(self, other: Posterior) -> Posterior:
        """The density proportional to q p: every component times every component, weighted by how well they agree."""
        pairs = [(left, right) for left in self._weighted_parts() for right in self.admit(other)._weighted_parts()]
        parts, logs = [], []
        for (log_left, left), (log_right, right) in pairs:
            both = left.product(right)
            agreement = left.log_density(both.mean) + right.log_density(both.mean) - both.log_density(both.mean)
            parts.append(both)
            logs.append(log_left + log_right + float(agreement))
        return self.unchecked(parts, logs)

    def quotient(self, other: Posterior) -> Posterior:
        """The density proportional to q / p for a single Gaussian p; see `Posterior.quotient`.

        Raises:
            MethodError: p has several components, by which one cannot divide.
        """
        divisor = self.admit(other)
        if len(divisor.components) > 1:
            _refuse("a quotient by a mixture is no mixture")
        (p,) = divisor.components
        parts, logs = [], []
        for log_weight, component in self._weighted_parts():
            left = component.quotient(p)
            agreement = component.log_density(left.mean) - p.log_density(left.mean) - left.log_density(left.mean)
            parts.append(left)
            logs.append(log_weight + float(agreement))
        return self.unchecked(parts, logs)

    def power(self, alpha: float) -> Posterior:
        """The density proportional to q^alpha, for alpha = 1 or one component; see `Posterior.power`.

        Raises:
            MethodError: the power of several components is no mixture.
        """
        if not alpha > 0:
            raise NonPositivePrecisionError(f"mixture to the power {alpha}: it must be positive")
        if len(self.components) > 1 and alpha != 1:
            _refuse("a power of a mixture is no mixture")
        return self if alpha == 1 else self.unchecked([self.components[0].power(alpha)])

    def sample(self, generator: torch.Generator | None = None, *, temperature: float = 1.0) -> Tensor:
        """Draw a component, and from it one tensor; the temperature acts within the component.

        See `Posterior.sample`. With several components and a temperature other than 1 this is not q^(1/temperature),
        which is no mixture: the weights are left as they are.
        """
        import torch

        if not 0 <= temperature < math.inf:
            raise NumericalError(f"temperature is {temperature}; it must be finite and at least 0")
        device = self.mean.device
        weights = torch.tensor(self.log_weights, dtype=torch.float64, device=device).exp()
        chosen = int(torch.multinomial(weights, 1, generator=generator))
        return self.components[chosen].sample(generator, temperature=temperature)

    def log_density(self, x: Tensor) -> Tensor:
        r"""Log-density, log sum_k pi_k q_k(x), in nats; 0-dim; see `Posterior.log_density`."""
        import torch

        logs = [each.log_density(x) + log_weight for log_weight, each in self._weighted_parts()]
        return torch.stack(logs).logsumexp(dim=0)

    def kl(self, other: Posterior) -> Tensor:
        """KL(q || p) where both have one component; see `Posterior.kl`.

        Raises:
            MethodError: there is no closed form for several.
        """
        p = self.admit(other)
        if len(self.components) + len(p.components) > 2:
            _refuse("the divergence of mixtures has no closed form; average log_density over samples")
        return self.components[0].kl(p.components[0])

    def _weighted_parts(self) -> list[tuple[float, Posterior]]:
        return list(zip(self.log_weights, self.components, strict=True))

    @classmethod
    def merge(
        cls, base: Posterior, sources: Sequence[Posterior], weights: Tensor, *, floor: float | None = None
    ) -> Posterior:
        """The rule at its mode, found by expectation maximisation at the default temperature; see `merge_mixtures`."""
        # Here, because the rule builds on this class.
        from mergekit_bayes.posterior.mixture_rule import merge_mixtures

        return merge_mixtures(base, sources, weights, floor=floor)[0]


def shares(log_weights: Sequence[float], log_densities: Sequence[float], temperature: float) -> tuple[float, ...]:
    """Responsibilities: exp(log pi_k + log q_k / temperature), normalised."""
    logs = [weight + density / temperature for weight, density in zip(log_weights, log_densities, strict=True)]
    total = _log_sum(logs)
    return tuple(math.exp(each - total) for each in logs)


def _log_sum(logs: Sequence[float]) -> float:
    highest = max(logs)
    return highest + math.log(math.fsum(math.exp(each - highest) for each in logs))


def _refuse(reason: str) -> NoReturn:
    raise MethodError(f"mixture posterior: {reason}")
