"""What every family of posteriors can do; a family is one file beside this one.

A posterior is the approximate distribution of one weight tensor after training. The families differ in the
shape of their precision. Each is closed under the algebra of natural parameters (product, quotient, power),
can be sampled and evaluated, and knows how several of its kind merge.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, Self

from mergekit_bayes.errors import MethodError, ShapeMismatchError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Posterior", "check_alike", "richest"]


class Posterior(ABC):
    """The posterior of one weight tensor: a mean, and a precision in the form of its family.

    Attributes:
        family: name of the family, as sidecars record it.
        richness: place of the family in the order isotropic < diagonal < kronecker < mixture; where two families meet,
            the result belongs to the richer one.
        mean: the posterior mean, shape (*weight), floating point.
    """

    family: ClassVar[str]
    richness: ClassVar[int]
    mean: Tensor

    @abstractmethod
    def precision_tensor(self) -> Tensor:
        """The diagonal of the precision at data scale, of a shape that broadcasts against `mean`.

        The inverse variance of each entry given all others; where entries are independent, its inverse variance.
        """

    @abstractmethod
    def quadratic(self, x: Tensor, *, beyond: Posterior | None = None) -> Tensor:
        """x^T S x, or x^T (S - S_beyond) x without forming the difference of two large numbers; 0-dim.

        Args:
            x: shape of the mean.
            beyond: a posterior of the same tensor, of which only the precision is used.
        """

    @abstractmethod
    def check(self) -> Self:
        """Check the values and return the posterior itself.

        Raises:
            NonFiniteError: the mean or the precision holds NaN or infinity.
            NonPositivePrecisionError: the precision is not positive.
        """

    @abstractmethod
    def with_mean(self, mean: Tensor) -> Self:
        """The same precision around another mean, whose values are not checked.

        Args:
            mean: shape, dtype and device of the present mean.
        """

    def admit(self, poorer: Posterior) -> Posterior:
        """A posterior of a poorer family, as one of this family: where families meet, the richer one takes over.

        Raises:
            MethodError: this family cannot express it.
        """
        raise MethodError(f"a `{self.family}` posterior cannot be combined entry by entry")

    @abstractmethod
    def product(self, other: Posterior) -> Posterior:
        """The normalised density proportional to q(x) p(x): natural parameters add.

        Raises:
            NonFiniteError: the sum of the precisions overflows.
        """

    @abstractmethod
    def quotient(self, other: Posterior) -> Posterior:
        """The normalised density proportional to q(x) / p(x): natural parameters subtract.

        Raises:
            NonPositivePrecisionError: q is not everywhere sharper than p, so that q / p cannot be normalised.
        """

    @abstractmethod
    def power(self, alpha: float) -> Posterior:
        """The normalised density proportional to q(x)^alpha: natural parameters scale.

        Raises:
            NonPositivePrecisionError: alpha is not positive.
        """

    @abstractmethod
    def sample(self, generator: torch.Generator | None = None, *, temperature: float = 1.0) -> Tensor:
        """Draw one tensor of the mean's shape from q^(1/temperature), whose precision is S / temperature.

        Args:
            generator: source of randomness on the mean's device; None is torch's global one.
            temperature: at least 0; 0 gives the mean, 1 the posterior at data scale.

        Raises:
            NumericalError: the temperature is negative or not finite.
        """

    @abstractmethod
    def log_density(self, x: Tensor) -> Tensor:
        """Log-density of x in nats, summed over all entries of the tensor; 0-dim."""

    @abstractmethod
    def kl(self, other: Posterior) -> Tensor:
        """KL(q || p) = E_q[log q - log p] in nats, summed over all entries; 0-dim, never negative."""

    @classmethod
    @abstractmethod
    def merge(
        cls, base: Posterior, sources: Sequence[Posterior], weights: Tensor, *, floor: float | None = None
    ) -> Posterior:
        """The rule for this family; `merge_posteriors` calls it on the richest family among its arguments."""


def check_alike(posteriors: Sequence[Posterior]) -> None:
    """Refuse posteriors that do not describe the same tensor, instead of broadcasting one against another.

    Raises:
        ShapeMismatchError: two means differ in shape, dtype or device.
    """
    first = posteriors[0].mean
    for posterior in posteriors[1:]:
        mean = posterior.mean
        if mean.shape != first.shape or mean.dtype != first.dtype or mean.device != first.device:
            raise ShapeMismatchError(
                f"posteriors of different tensors: {tuple(first.shape)} {first.dtype} on {first.device} "
                f"and {tuple(mean.shape)} {mean.dtype} on {mean.device}"
            )


def richest(posteriors: Iterable[Posterior]) -> type[Posterior]:
    """The richest family among `posteriors`, in which all of them can be expressed.

    Raises:
        ValueError: there are none.
    """
    found: type[Posterior] | None = None
    for posterior in posteriors:  # a loop, because torch.compile cannot trace max(key=...)
        if found is None or type(posterior).richness > found.richness:
            found = type(posterior)
    if found is None:
        raise ValueError("richest() needs at least one posterior")
    return found
