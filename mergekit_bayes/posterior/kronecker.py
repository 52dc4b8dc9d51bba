r"""Gaussians whose precision is a diagonal plus Kronecker products: what is known of a linear layer.

    S = diag(D) + sum_k G_k (x) A_k

acts on matrices W of shape (out, in) as  S[W] = D * W + sum_k G_k W A_k. D holds the prior S_0 and whatever else is
diagonal; each task contributes one term, so that a merge of T tasks has T of them. The sum is never formed as one
matrix of out * in rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Self, final

from mergekit_bayes.errors import MethodError, NonFiniteError, NumericalError, ShapeMismatchError
from mergekit_bayes.posterior.closed_form import Sampler, check_positive, log_determinant, trace_of_ratio
from mergekit_bayes.posterior.diagonal import Diagonal
from mergekit_bayes.posterior.elementwise import Elementwise
from mergekit_bayes.posterior.family import Posterior, check_alike
from mergekit_bayes.posterior.solve import solve, tightest
from mergekit_bayes.posterior.term import Term, combined

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Kronecker", "as_kronecker"]


@final
@dataclass(frozen=True, eq=False, init=False, repr=False)
class Kronecker(Posterior):
    r"""q(W) = N(mean, S^-1) with S = diag(diagonal) + sum_k G_k (x) A_k.

    Args:
        mean: posterior mean, shape (out, in), finite floating point.
        diagonal: the diagonal part of S at data scale, 0-dim or of the mean's shape; finite, positive.
        terms: the Kronecker terms, in the mean's dtype on its device; symmetric, positive semi-definite up to rounding.

    Raises:
        ShapeMismatchError: shapes, dtypes or devices do not fit.
        NonFiniteError: NaN or infinity.
        NonPositivePrecisionError: S is not positive definite.
    """

    mean: Tensor
    diagonal: Tensor
    terms: tuple[Term, ...]
    family: ClassVar[str] = "kronecker"
    richness: ClassVar[int] = 2

    def __init__(self, mean: Tensor, diagonal: Tensor, terms: Iterable[Term]) -> None:
        self._set(mean, diagonal, terms)
        self.check()

    @classmethod
    def unchecked(cls, mean: Tensor, diagonal: Tensor, terms: Iterable[Term]) -> Self:
        """Build a posterior whose values the caller has checked, or will check.

        Args:
            mean: shape (out, in).
            diagonal: 0-dim or of the mean's shape.
            terms: each with factors of the shapes that `Term` states.

        Raises:
            ShapeMismatchError: shapes, dtypes or devices do not fit; these are still checked.
        """
        posterior = object.__new__(cls)
        posterior._set(mean, diagonal, terms)
        return posterior

    def _set(self, mean: Tensor, diagonal: Tensor, terms: Iterable[Term]) -> None:
        terms = tuple(terms)
        _check_shapes(mean, diagonal, terms)
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "diagonal", diagonal)
        object.__setattr__(self, "terms", terms)

    def __repr__(self) -> str:
        return f"Kronecker(shape={tuple(self.mean.shape)}, dtype={self.mean.dtype}, terms={len(self.terms)})"

    def precision_times(self, x: Tensor) -> Tensor:
        """S[x] for a matrix x of the mean's shape."""
        product = x * self.diagonal
        for term in self.terms:
            product = product.add_(term.times(x))
        return product

    def quadratic(self, x: Tensor, *, beyond: Posterior | None = None) -> Tensor:
        """x^T (S - S_beyond) x; see `Posterior.quadratic`."""
        diagonal, terms = self.diagonal, self.terms
        if beyond is not None:
            prior = self.admit(beyond)
            diagonal = diagonal - prior.diagonal
            terms = combined((*terms, *(term.scaled(-1.0) for term in prior.terms)))
        total = x.square().mul_(diagonal).sum()
        for term in terms:
            total = total + term.quadratic(x)
        return total

    def precision_tensor(self) -> Tensor:
        r"""The diagonal of S, of the mean's shape: the precision of each entry given all the others.

        It is what a diagonal estimator of the same curvature would have written, and the precision of the diagonal
        Gaussian p that minimises KL(p || q). Inverse marginal variances are smaller: 1 / (S^-1)_ii <= S_ii.
        """
        total = self.diagonal
        for term in self.terms:
            total = total + term.diagonal()
        return total.expand_as(self.mean)

    def with_mean(self, mean: Tensor) -> Self:
        """The same precision around another mean; see `Posterior.with_mean`."""
        return type(self).unchecked(mean, self.diagonal, self.terms)

    def to(self, dtype: torch.dtype) -> Self:
        """The same posterior in another dtype."""
        terms = [term.to(dtype) for term in self.terms]
        return type(self).unchecked(self.mean.to(dtype), self.diagonal.to(dtype), terms)

    def admit(self, poorer: Posterior) -> Kronecker:
        """A posterior of a poorer family as one of this family without terms; see `Posterior.admit`."""
        return as_kronecker(poorer)

    def shrunk(self, gamma: float) -> Self:
        """The off-diagonal entries of the factors drawn towards zero: 0 changes nothing, 1 leaves a diagonal S.

        See `Term.shrunk`. The diagonal of S stays as it is.

        Raises:
            NumericalError: gamma is not between 0 and 1.
        """
        if not 0 <= gamma <= 1:
            raise NumericalError(f"shrinkage is {gamma}; it must be between 0 and 1")
        if gamma == 0:
            return self
        diagonal, terms = self.diagonal, []
        for term in self.terms:
            shrunk, beside = term.shrunk(gamma)
            diagonal = diagonal if beside is None else diagonal + beside
            terms.append(shrunk)
        return type(self).unchecked(self.mean, diagonal, terms)

    def inputs_only(self) -> Self:
        """All outputs given the same precision, the average of theirs: a scalar diagonal and one term I (x) A.

        A diagonal that differs between the inputs goes into A, but for its smallest number.
        """
        rows = len(self.mean)
        terms = [Term(term.over_outputs(rows), None) for term in self.terms]
        diagonal = self.diagonal
        if diagonal.dim():
            columns = diagonal.mean(dim=0)
            diagonal = columns.amin() if columns.numel() else diagonal.new_ones(())
            terms.append(Term((columns - diagonal).diag(), None))
        return type(self).unchecked(self.mean, diagonal, combined(terms))

    def check(self) -> Self:
        """Check the values and return the posterior itself; see `Posterior.check`.

        Raises:
            NumericalError: the mean is not floating point, or a factor not symmetric.
        """
        Diagonal.unchecked(self.mean, self.diagonal.expand_as(self.mean)).check()
        for position, term in enumerate(self.terms):
            _check_term(term, f"term {position} of a kronecker precision")
        check_positive(self)
        return self

    def product(self, other: Posterior) -> Posterior:
        """The density proportional to q p; see `Posterior.product`."""
        return self._combine(other, 1.0)

    def quotient(self, other: Posterior) -> Posterior:
        """The density proportional to q / p; see `Posterior.quotient`."""
        return self._combine(other, -1.0)

    def _combine(self, other: Posterior, sign: float) -> Posterior:
        """The density q p^sign: S = S_1 +- S_2 and m = m_1 +- S^-1 S_2 (m_2 - m_1)."""
        if other.richness > self.richness:
            host = other.admit(self)
            return host.product(other) if sign > 0 else host.quotient(other)
        check_alike((self, other))
        partner = self.admit(other)
        terms = combined((*self.terms, *(term.scaled(sign) for term in partner.terms)))
        precision = self.unchecked(self.mean, self.diagonal + partner.diagonal * sign, terms).check()
        force = partner.precision_times(other.mean - self.mean) * sign
        shift = solve(precision.diagonal, terms, force, tolerance=tightest(force), max_iterations=1000).x
        return precision.with_mean(self.mean + shift)

    def power(self, alpha: float) -> Posterior:
        """The density proportional to q^alpha; see `Posterior.power`."""
        terms = [term.scaled(alpha) for term in self.terms]
        return self.unchecked(self.mean, self.diagonal * alpha, terms).check()

    @cached_property
    def sampler(self) -> Sampler:
        """What all draws from this posterior share: found for the first one, as large as the factors."""
        return Sampler(self)

    def sample(self, generator: torch.Generator | None = None, *, temperature: float = 1.0) -> Tensor:
        """Draw one tensor of the mean's shape; see `Posterior.sample`.

        Raises:
            MethodError: S has a negative term, from removing a task, in a layer too large for a dense matrix.
        """
        if not 0 <= temperature < math.inf:
            raise NumericalError(f"temperature is {temperature}; it must be finite and at least 0")
        return self.sampler.draw(generator).mul_(temperature**0.5).add_(self.mean)

    def log_density(self, x: Tensor) -> Tensor:
        r"""Log-density, log q(x) = 1/2 (log |S| - n log 2 pi - (x - m)^T S (x - m)), in nats; 0-dim.

        Args:
            x: a point, of the mean's shape.

        Raises:
            ShapeMismatchError: x has another shape than the mean.
            MethodError: log |S| has no closed form and the layer is too large for a dense matrix.
        """
        if x.shape != self.mean.shape:
            raise ShapeMismatchError(f"log_density: x has shape {tuple(x.shape)}, the mean {tuple(self.mean.shape)}")
        constant = x.numel() * math.log(2 * math.pi)
        return (log_determinant(self) - constant - self.quadratic(x - self.mean)) / 2

    def kl(self, other: Posterior) -> Tensor:
        r"""KL(q || p) = 1/2 (tr S_p S_q^-1 - n + log |S_q| - log |S_p| + (m_q - m_p)^T S_p (m_q - m_p)); 0-dim.

        Raises:
            ShapeMismatchError: the means differ in shape, dtype or device.
            MethodError: a term has no closed form and the layer is too large for a dense matrix.
        """
        if other.richness > self.richness:
            return other.admit(self).kl(other)
        check_alike((self, other))
        p = self.admit(other)
        spread = trace_of_ratio(p, self) - self.mean.numel() + log_determinant(self) - log_determinant(p)
        return (spread.clamp(min=0) + p.quadratic(self.mean - p.mean)) / 2

    @classmethod
    def merge(
        cls, base: Posterior, sources: Sequence[Posterior], weights: Tensor, *, floor: float | None = None
    ) -> Kronecker:
        """The rule, with its system solved to a relative residual of 1e-4; see `merge_kronecker`.

        Raises:
            NonPositivePrecisionError: negative weights have left S without positive definiteness.
        """
        # Here, because the rule builds on this class.
        from mergekit_bayes.posterior.kronecker_rule import merge_kronecker

        return merge_kronecker(base, sources, weights, floor=floor)[0]


def as_kronecker(posterior: Posterior) -> Kronecker:
    """A posterior of this family or a poorer one, in this family.

    Raises:
        MethodError: a richer family.
        ShapeMismatchError: the mean is not a matrix.
    """
    if isinstance(posterior, Kronecker):
        return posterior
    if not isinstance(posterior, Elementwise):
        raise MethodError(f"a `{posterior.family}` posterior cannot be expressed with Kronecker terms")
    return Kronecker.unchecked(posterior.mean, posterior.precision, ())


def _check_shapes(mean: Tensor, diagonal: Tensor, terms: Sequence[Term]) -> None:
    if mean.dim() != 2:
        raise ShapeMismatchError(f"kronecker posterior: mean of shape {tuple(mean.shape)}, not a matrix (out, in)")
    if diagonal.dim() and diagonal.shape != mean.shape:
        raise ShapeMismatchError(
            f"kronecker posterior: mean of shape {tuple(mean.shape)}, diagonal {tuple(diagonal.shape)}"
        )
    rows, columns = mean.shape
    for position, term in enumerate(terms):
        wanted = {"input": (columns, columns), "output": (rows, rows), "eigenvalues": (rows, columns)}
        for name, value in term._asdict().items():
            if value is not None and tuple(value.shape) != wanted[name]:
                raise ShapeMismatchError(
                    f"kronecker posterior: {name} of term {position} has shape {tuple(value.shape)}; "
                    f"a mean of shape {(rows, columns)} needs {wanted[name]}"
                )
    for tensor in (diagonal, *(each for term in terms for each in term.tensors())):
        if tensor.dtype != mean.dtype or tensor.device != mean.device:
            raise ShapeMismatchError(
                f"kronecker posterior: mean is {mean.dtype} on {mean.device}, "
                f"a part of its precision {tensor.dtype} on {tensor.device}; they must agree"
            )


def _check_term(term: Term, where: str) -> None:
    for name, value in term._asdict().items():
        if value is None:
            continue
        if not bool(value.isfinite().all()):
            raise NonFiniteError(f"{where}: {name} holds NaN or infinity")
        if name != "eigenvalues" and term.eigenvalues is None:
            _check_symmetric(value, f"{where}: {name}")


def _check_symmetric(factor: Tensor, where: str) -> None:
    if factor.numel() == 0:
        return
    skew, size = float((factor - factor.mT).abs().amax()), float(factor.abs().amax())
    if skew > 1e-3 * size:
        raise NumericalError(f"{where} is not symmetric: entries differ by {skew:.3g} at a size of {size:.3g}")
