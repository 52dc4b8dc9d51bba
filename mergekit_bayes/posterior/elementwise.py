r"""The algebra of Gaussians whose precision acts entry by entry: one number, or one number per entry.

With mean m and precision S the natural parameters are S m and S. They are never formed: written as
corrections of a mean, the same formulas lose nothing when means are large and their differences small, as
with fine-tuned models.

    product    S = S_1 + S_2       m = m_1 + S_2 / S (m_2 - m_1)
    quotient   S = S_1 - S_2       m = m_1 + S_2 / S (m_1 - m_2)
    power      S = alpha S_1       m = m_1
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from mergekit_bayes.errors import (
    MethodError,
    NonFiniteError,
    NonPositivePrecisionError,
    NumericalError,
    ShapeMismatchError,
)
from mergekit_bayes.posterior.family import Posterior, check_alike

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Elementwise"]


class Elementwise(Posterior):
    """A Gaussian with independent entries; the final classes say which shape the precision has.

    Attributes:
        mean: shape (*weight), floating point.
        precision: inverse variance at data scale, 0-dim or of the mean's shape, in the mean's dtype, on its
            device.
    """

    precision: Tensor

    @classmethod
    def unchecked(cls, mean: Tensor, precision: Tensor) -> Self:
        """Build a posterior whose values the caller has checked, or will check; legal inside torch.compile.

        Args:
            mean: shape (*weight).
            precision: of the shape the family wants, in the mean's dtype and on its device.

        Raises:
            ShapeMismatchError: shapes, dtypes or devices do not fit; these are still checked.
        """
        posterior = object.__new__(cls)
        posterior._set(mean, precision)
        return posterior

    def _set(self, mean: Tensor, precision: Tensor) -> None:
        if mean.dtype != precision.dtype or mean.device != precision.device:
            raise ShapeMismatchError(
                f"{self.family} posterior: mean is {mean.dtype} on {mean.device}, "
                f"precision {precision.dtype} on {precision.device}; they must agree"
            )
        # The instances are frozen dataclasses; this is the one place that fills them.
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "precision", precision)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.mean.shape)}, dtype={self.mean.dtype})"

    def precision_tensor(self) -> Tensor:
        """Inverse variances at data scale: 0-dim or of the mean's shape."""
        return self.precision

    def quadratic(self, x: Tensor, *, beyond: Posterior | None = None) -> Tensor:
        """The sum of S x^2, or of (S - S_beyond) x^2; see `Posterior.quadratic`."""
        if beyond is not None and not isinstance(beyond, Elementwise):
            return beyond.admit(self).quadratic(x, beyond=beyond)
        curvature = self.precision if beyond is None else self.precision - beyond.precision
        return x.square().mul_(curvature).sum()

    def with_mean(self, mean: Tensor) -> Self:
        """The same precision around another mean; see `Posterior.with_mean`."""
        return type(self).unchecked(mean, self.precision)

    def check(self) -> Self:
        """Check the values and return the posterior itself; see `Posterior.check`."""
        if not self.mean.is_floating_point():
            raise NumericalError(f"{self.family} posterior: the mean is {self.mean.dtype}; it must be floating point")
        if self.mean.numel() == 0:
            return self
        # NaN passes through aminmax and fails every comparison; one pass where isfinite() takes two.
        low, high = self.mean.aminmax()
        if not (low > -math.inf and high < math.inf):
            raise NonFiniteError(f"{self.family} mean: {_share(~self.mean.isfinite())} NaN or infinite")
        low, high = self.precision.aminmax()
        if not (low > -math.inf and high < math.inf):
            raise NonFiniteError(f"{self.family} precision: {_share(~self.precision.isfinite())} NaN or infinite")
        if not low > 0:
            raise NonPositivePrecisionError(
                f"{self.family} precision: {_share(self.precision <= 0)} zero or negative, "
                f"the lowest is {float(low):.6g}; a precision must be positive"
            )
        return self

    def product(self, other: Posterior) -> Posterior:
        """The density proportional to q p; see `Posterior.product`."""
        if not isinstance(other, Elementwise):
            return other.admit(self).product(other)
        family, other = self._meet(other)
        precision = self.precision + other.precision
        mean = self.mean + other.precision / precision * (other.mean - self.mean)
        return family.unchecked(mean, precision).check()

    def quotient(self, other: Posterior) -> Posterior:
        """The density proportional to q / p; see `Posterior.quotient`."""
        if not isinstance(other, Elementwise):
            return other.admit(self).quotient(other)
        family, other = self._meet(other)
        precision = self.precision - other.precision
        # Checked before dividing: a zero is reported as what it is, not as the infinite mean it causes.
        family.unchecked(self.mean, precision).check()
        mean = self.mean + other.precision / precision * (self.mean - other.mean)
        return family.unchecked(mean, precision).check()

    def power(self, alpha: float) -> Posterior:
        """The density proportional to q^alpha; see `Posterior.power`."""
        return type(self).unchecked(self.mean, self.precision * alpha).check()

    def sample(self, generator: torch.Generator | None = None, *, temperature: float = 1.0) -> Tensor:
        """Draw one tensor of the mean's shape; see `Posterior.sample`."""
        if not 0 <= temperature < math.inf:
            raise NumericalError(f"temperature is {temperature}; it must be finite and at least 0")
        noise = self.mean.new_empty(self.mean.shape).normal_(generator=generator)
        return noise.mul_((temperature / self.precision).sqrt()).add_(self.mean)

    def log_density(self, x: Tensor) -> Tensor:
        r"""Log-density, log q(x) = 1/2 sum (log S - log 2 pi - S (x - m)^2), in nats; 0-dim.

        Args:
            x: a point, of the mean's shape.

        Raises:
            ShapeMismatchError: x has another shape than the mean.
        """
        if x.shape != self.mean.shape:
            raise ShapeMismatchError(f"log_density: x has shape {tuple(x.shape)}, the mean {tuple(self.mean.shape)}")
        squares = (x - self.mean).square() * self.precision
        return (self.precision.log() - math.log(2 * math.pi) - squares).sum() / 2

    def kl(self, other: Posterior) -> Tensor:
        r"""KL(q || p) = 1/2 sum (r - 1 - log r + S_p (m_q - m_p)^2) with r = S_p / S_q, in nats; 0-dim.

        Raises:
            ShapeMismatchError: the means differ in shape, dtype or device.
        """
        if not isinstance(other, Elementwise):
            return other.admit(self).kl(other)
        _, other = self._meet(other)
        excess = (other.precision - self.precision) / self.precision
        # Near r = 1 the logarithms cancel, far from it r - 1 loses a small r; and it is never negative.
        far = other.precision.log() - self.precision.log()
        spread = (excess - excess.log1p().where(excess.abs() < 0.5, far)).clamp(min=0)
        return (spread + (self.mean - other.mean).square() * other.precision).sum() / 2

    @classmethod
    def merge(
        cls, base: Posterior, sources: Sequence[Posterior], weights: Tensor, *, floor: float | None = None
    ) -> Self:
        r"""The rule, entry by entry; see `mergekit_bayes.posterior.merge_posteriors`.

        The base's share is written (1 - sum alpha_t) S_0, so that weights summing to one remove it exactly.

        Only the four operations occur, each correctly rounded: eager and compiled code then agree to the last
        bit on a CPU, which `addcmul` (fused on some processors) would break.
        """
        prior = _elementwise(base)
        alpha = weights.to(prior.mean.dtype).unbind()
        precision = prior.precision * (1 - weights.sum()).to(prior.mean.dtype)
        weighted, pull = _weighted(sources[0], alpha[0], prior.mean)
        precision = _accumulate(precision, weighted)
        for source, task_weight in zip(sources[1:], alpha[1:], strict=True):
            weighted, force = _weighted(source, task_weight, prior.mean)
            precision, pull = _accumulate(precision, weighted), pull.add_(force)
        if floor is not None:
            precision = precision.clamp_(min=floor)
        return cls.unchecked(pull.div_(precision).add_(prior.mean), precision)

    def _meet(self, other: Elementwise) -> tuple[type[Elementwise], Elementwise]:
        """The richer family of the two, and `other` once it is known to describe the same tensor."""
        check_alike((self, other))
        return (type(self) if self.richness >= other.richness else type(other)), other


def _weighted(source: Posterior, task_weight: Tensor, origin: Tensor) -> tuple[Tensor, Tensor]:
    """The terms alpha S and alpha S (m - origin) of one source, both new tensors."""
    weighted = _elementwise(source).precision * task_weight
    return weighted, (source.mean - origin).mul_(weighted)


def _accumulate(total: Tensor, term: Tensor) -> Tensor:
    """Add two temporaries in the memory of the larger; new memory would cost more than the addition."""
    return total.add_(term) if total.dim() >= term.dim() else term.add_(total)


def _elementwise(posterior: Posterior) -> Elementwise:
    if not isinstance(posterior, Elementwise):
        raise MethodError(f"a `{posterior.family}` posterior cannot be combined entry by entry")
    return posterior


def _share(wrong: Tensor) -> str:
    count, total = int(wrong.sum()), wrong.numel()
    return f"{count} of {total} entries ({count / total:.3g})"
