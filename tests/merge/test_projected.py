"""A precision seen through a factor, against the dense precision matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergekit_bayes.merge.projected import seen_by_inputs, seen_by_outputs
from mergekit_bayes.posterior import Diagonal, Isotropic, Posterior
from mergekit_bayes.posterior.kronecker import Kronecker
from mergekit_bayes.posterior.term import Term

OUT, IN, RANK = 6, 5, 3


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(seed: int, *shape: int) -> Tensor:
    return normal(seed, *shape).exp()


def definite(seed: int, size: int) -> Tensor:
    root = normal(seed, size, size)
    return root @ root.T


def orthonormal(seed: int, rows: int, columns: int) -> Tensor:
    return torch.linalg.qr(normal(seed, rows, columns)).Q


def precisions(rows: int = OUT, columns: int = IN) -> dict[str, Posterior]:
    """One posterior of every form that a precision can have, with a random mean."""
    mean = normal(0, rows, columns)
    plain = Term(definite(1, columns), definite(2, rows))
    gram = Term(definite(3, columns), None)
    corrected = Term(orthonormal(4, columns, columns), orthonormal(5, rows, rows), positive(6, rows, columns))
    inputs_corrected = Term(orthonormal(7, columns, columns), None, positive(8, rows, columns))
    scalar, entries = torch.tensor(0.3).double(), positive(9, rows, columns)
    return {
        "isotropic": Isotropic(mean, 0.7),
        "diagonal": Diagonal(mean, entries),
        "plain": Kronecker(mean, scalar, [plain]),
        "gram": Kronecker(mean, entries, [gram]),
        "corrected": Kronecker(mean, scalar, [corrected]),
        "all": Kronecker(mean, entries, [plain, gram, corrected, inputs_corrected]),
    }


def dense(posterior: Posterior) -> Tensor:
    """S as a matrix on row-major vectors, column by column from its quadratic form."""
    shape = posterior.mean.shape
    units = torch.eye(shape.numel(), dtype=torch.float64).view(-1, *shape)
    squares = [posterior.quadratic(unit) for unit in units]
    return torch.stack(
        [
            torch.stack(
                [(posterior.quadratic(left + right) - squares[i] - squares[j]) / 2 for j, right in enumerate(units)]
            )
            for i, left in enumerate(units)
        ]
    )


@pytest.mark.parametrize("form", list(precisions()))
def test_a_factor_sees_the_projection_of_the_dense_precision(form: str) -> None:
    posterior = precisions()[form]
    matrix = dense(posterior)
    a, b = orthonormal(10, IN, RANK).T, orthonormal(11, OUT, RANK)
    # vec(B a) = (I (x) a^T) vec(B) and vec(b A) = (b (x) I) vec(A), row-major
    to_outputs = torch.kron(torch.eye(OUT, dtype=torch.float64), a.T.contiguous())
    to_inputs = torch.kron(b.contiguous(), torch.eye(IN, dtype=torch.float64))
    cases = [
        (seen_by_outputs(posterior, a), to_outputs, (OUT, RANK)),
        (seen_by_inputs(posterior, b), to_inputs, (RANK, IN)),
    ]
    for seen, embedding, shape in cases:
        wanted = embedding.T @ matrix @ embedding
        for seed in range(3):
            x = normal(20 + seed, *shape)
            torch.testing.assert_close(seen.times(x).reshape(-1), wanted @ x.reshape(-1))
        torch.testing.assert_close(seen.diagonal.reshape(-1), wanted.diagonal())
