"""The fitted tier: a polynomial of the weights through the evaluated mixes of each method, and how far it is off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.preview.design import Mix
from mergekit_bayes.preview.polynomial import Polynomial, fit_polynomial, free_weights, polynomial_terms

__all__ = ["Fitted", "fit_scores"]

Array: TypeAlias = NDArray[np.float64]

DEGREE = 2
"""Losses of merges are close to quadratic in the weights: the surrogate of MAP (Li et al., arXiv 2406.07529)."""


@dataclass(frozen=True, eq=False)
class Fitted:
    """Scores of one method as a function of its weights.

    Attributes:
        scores: at every mix of the design, shape (mixes, tasks).
        error: root mean square error at evaluated mixes that were left out, shape (tasks,), in the task's metric; NaN
            where there was none to leave out.
        fitted_to: number of evaluated mixes.
    """

    scores: Array
    error: Array
    fitted_to: int


def fit_scores(mixes: Sequence[Mix], evaluated: Mapping[Mix, Array]) -> Fitted | None:
    """Fits the scores of one method; perplexities are best fitted as losses, which the caller decides.

    Args:
        mixes: of the design.
        evaluated: scores of those that were evaluated, shape (tasks,); those with NaN are passed over.

    Returns:
        The fit; None where fewer mixes were evaluated than the polynomial has terms.
    """
    known = {mix: scores for mix, scores in evaluated.items() if np.isfinite(scores).all()}
    if not known or len(known) < polynomial_terms(free_weights(list(known)), DEGREE):
        return None
    at = list(known)
    polynomial: Polynomial = fit_polynomial(at, np.stack([known[mix] for mix in at]), degree=DEGREE)
    return Fitted(polynomial(mixes), polynomial.error, len(at))
