r"""What a precision with Kronecker terms can tell only through its eigenvalues: volume, traces and samples.

Exact in closed form for one term beside a scalar diagonal, which is what one task leaves: S has the eigenvectors
U_G (x) U_A and the eigenvalues d + g_i a_j. Otherwise small layers are written out as one dense matrix, in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_bayes.errors import MethodError, NonPositivePrecisionError
from mergekit_bayes.posterior.eigenbasis import Basis, spectrum
from mergekit_bayes.posterior.solve import Solver, solve, tightest
from mergekit_bayes.posterior.term import ROUNDING, Term, combined

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mergekit_bayes.posterior.kronecker import Kronecker

__all__ = ["DENSE_ENTRIES", "Sampler", "check_positive", "dense", "log_determinant", "trace_of_ratio"]

DENSE_ENTRIES = 2048
"""Largest number of weights whose full precision is formed: 32 MiB in float64, a second to factorise."""


def dense(q: Kronecker) -> Tensor:
    """S as one symmetric matrix, (out * in, out * in) in float64, for vectors that hold W row by row.

    Raises:
        MethodError: more than `DENSE_ENTRIES` weights.
    """
    import torch

    entries = q.mean.numel()
    if entries > DENSE_ENTRIES:
        raise MethodError(
            f"{q!r}: this needs the eigenvalues of its precision, which have a closed form only for one Kronecker term "
            f"beside a scalar diagonal; a full matrix is formed for at most {DENSE_ENTRIES} weights, not {entries}; "
            "ask each task's posterior, or a diagonal one"
        )
    matrix = q.diagonal.double().expand(q.mean.shape).flatten().diag()
    eye = torch.eye(len(q.mean), dtype=torch.float64, device=q.mean.device)
    for term in q.terms:
        inner, outer = term.input.double(), eye if term.output is None else term.output.double()
        product = torch.kron(outer, inner)
        if term.eigenvalues is not None:
            product = (product * term.eigenvalues.double().flatten()) @ product.mT
        matrix = matrix + product
    return matrix


def log_determinant(q: Kronecker) -> Tensor:
    """The logarithm of |S| in nats; 0-dim.

    Raises:
        MethodError: there is no closed form and the layer is too large for a dense matrix.
        NonPositivePrecisionError: S is not positive definite.
    """
    if not q.terms:
        return q.diagonal.expand_as(q.mean).log().sum()
    known = _spectrum(q)
    if known is not None:
        return _eigenvalues(known).log().sum()
    return 2 * _cholesky(q).diagonal().log().sum().to(q.mean.dtype)


def trace_of_ratio(p: Kronecker, q: Kronecker) -> Tensor:
    """tr(S_p S_q^-1): how much more certain p is than q, summed over all directions; 0-dim.

    Raises:
        MethodError: there is no closed form and the layer is too large for a dense matrix.
        NonPositivePrecisionError: S_q is not positive definite.
    """
    if not q.terms:
        return (p.precision_tensor() / q.diagonal).sum()
    known = _spectrum(q)
    if known is None:
        import torch

        return torch.cholesky_solve(dense(p), _cholesky(q)).diagonal().sum().to(q.mean.dtype)
    basis, variances = Basis(known.input, known.output), _eigenvalues(known).reciprocal()
    total = (p.diagonal * known._replace(eigenvalues=variances).diagonal()).sum()
    for term in p.terms:
        total = total + (variances * basis.term(term).diagonal()).sum()
    return total


class Sampler:
    r"""Draws from N(0, S^-1): what can be known of S once and for all draws is found here.

    In closed form a draw is S^-1/2 z. Otherwise one perturbs and solves (Papandreou and Yuille, 2010): S^-1 b is such
    a draw when b ~ N(0, S), and b = sqrt(D) * z_0 + sum_k G_k^1/2 Z_k A_k^1/2 is one.

    Args:
        q: the posterior; its mean plays no part.

    Raises:
        NonPositivePrecisionError: S is not positive definite.
        MethodError: a term with negative eigenvalues in a large layer, from removing a task: it has no square root.
    """

    def __init__(self, q: Kronecker) -> None:
        self._like, self._diagonal = q.mean, q.diagonal
        self._solver: Solver | None = None
        self._roots: list[Term] = []
        self._inverse_root: Term | None = None
        self._cholesky: Tensor | None = None
        known = _spectrum(q) if q.terms else None
        if known is not None:
            self._inverse_root = known._replace(eigenvalues=_eigenvalues(known).rsqrt())
            return
        if not q.terms or q.mean.numel() == 0:
            return
        terms, zero = combined(q.terms), q.diagonal.new_zeros(())
        for term in terms:
            single = spectrum(zero, (term,), len(q.mean))
            assert single is not None  # one term beside one number
            assert single.eigenvalues is not None
            if _lowest(single) < 0:
                self._cholesky = _cholesky(q)
                return
            self._roots.append(single._replace(eigenvalues=single.eigenvalues.sqrt()))
        self._solver = Solver(q.diagonal, terms, len(q.mean))

    def draw(self, generator: torch.Generator | None) -> Tensor:
        """One draw, of the mean's shape.

        Raises:
            NonPositivePrecisionError: S is not positive definite.
        """
        if self._inverse_root is not None:
            return self._inverse_root.times(self._noise(generator))
        if self._cholesky is not None:
            return _solved_by(self._cholesky, self._noise(generator))
        if self._solver is None:
            return self._noise(generator) * self._diagonal.rsqrt()
        force = self._noise(generator) * self._diagonal.sqrt()
        for root in self._roots:
            force = force + root.times(self._noise(generator))
        return self._solver.solve(force, tolerance=tightest(force), max_iterations=1000).x

    def _noise(self, generator: torch.Generator | None) -> Tensor:
        return self._like.new_empty(self._like.shape).normal_(generator=generator)


def check_positive(q: Kronecker) -> None:
    """Refuse a precision that is not positive definite.

    A positive diagonal and semi-definite terms suffice. With a term that is not, which removing a task leaves behind,
    the eigenvalues decide where they can be had; in larger layers a solve with one fixed right-hand side looks for a
    direction of negative curvature, and nearly always finds one where there is one.

    Raises:
        NonPositivePrecisionError: S is not positive definite.
    """
    if all(_semi_definite(term) for term in q.terms):
        return
    known = _spectrum(q)
    if known is not None:
        _eigenvalues(known)
    elif q.mean.numel() <= DENSE_ENTRIES:
        _cholesky(q)
    else:
        import torch

        probe = torch.Generator(q.mean.device).manual_seed(0)
        noise = q.mean.new_empty(q.mean.shape).normal_(generator=probe)
        solve(q.diagonal, combined(q.terms), noise, tolerance=1e-3, max_iterations=100)


def _spectrum(q: Kronecker) -> Term | None:
    return spectrum(q.diagonal, combined(q.terms), len(q.mean))


def _eigenvalues(known: Term) -> Tensor:
    """The eigenvalues of a spectrum, once they are known to be positive."""
    assert known.eigenvalues is not None
    lowest = _lowest(known)
    if known.eigenvalues.numel() and not lowest > 0:
        count = int((known.eigenvalues <= 0).sum())
        raise NonPositivePrecisionError(
            f"kronecker precision: {count} of {known.eigenvalues.numel()} eigenvalues zero or negative, "
            f"the lowest is {lowest:.6g}; a precision must be positive"
        )
    return known.eigenvalues


def _lowest(known: Term) -> float:
    assert known.eigenvalues is not None
    return float(known.eigenvalues.amin()) if known.eigenvalues.numel() else 0.0


def _cholesky(q: Kronecker) -> Tensor:
    import torch

    factor: Tensor
    factor, fault = torch.linalg.cholesky_ex(dense(q))
    if int(fault):
        raise NonPositivePrecisionError(
            f"kronecker precision: the full matrix of {q.mean.numel()} weights is not positive definite; "
            "a precision must be positive in every direction"
        )
    return factor


def _solved_by(cholesky: Tensor, noise: Tensor) -> Tensor:
    import torch

    column = noise.double().reshape(-1, 1)
    drawn: Tensor = torch.linalg.solve_triangular(cholesky.mT, column, upper=True)
    return drawn.reshape(noise.shape).to(noise.dtype)


def _semi_definite(term: Term) -> bool:
    """Whether a term is positive semi-definite up to rounding; False may also mean both factors are negative."""
    if term.eigenvalues is not None:
        return bool((term.eigenvalues >= 0).all())
    return all(_factor_semi_definite(factor) for factor in term.tensors())


def _factor_semi_definite(factor: Tensor) -> bool:
    import torch

    diagonal = factor.diagonal()
    if factor.numel() == 0:
        return True
    if bool((diagonal < 0).any()):
        return False
    room = 4 * ROUNDING * len(factor) * diagonal.amax()
    if not room > 0:
        return bool((factor == 0).all())
    shifted = factor.clone()
    shifted.diagonal().add_(room)
    return int(torch.linalg.cholesky_ex(shifted).info) == 0
