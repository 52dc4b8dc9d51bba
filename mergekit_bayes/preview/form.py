"""What a merge method does to the moves of its sources, found out by trying: a weighted sum, the rule, or neither."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from mergekit_bayes.errors import MergekitBayesError
from mergekit_bayes.merge.registry import Merge, MergeMethod
from mergekit_bayes.posterior import Diagonal, Posterior

__all__ = ["Form", "form_of"]

Form: TypeAlias = Literal["sum", "rule", "other"]

_ENTRIES, _SOURCES = 7, 3
_WEIGHTS = ((0.2, 0.5, 0.3), (0.7, 0.4, 0.5), (0.1, 0.2, 0.0))


def form_of(method: MergeMethod, options: Mapping[str, object]) -> Form:
    """Which formula a method's kernel follows, for every weight and entry.

    Args:
        method: the method.
        options: keyword arguments of its kernel.

    Returns:
        `sum` for m = theta_0 + sum w_s (m_s - theta_0), or without a base for m = sum w_s m_s; `rule` for the rule of
        `mergekit_bayes.posterior`, with S_0 = 0 where the method has no prior; `other` for everything else, also for
        methods that see whole tensors.
    """
    if method.scope != "element":
        return "other"
    generator = torch.Generator().manual_seed(0)
    draw = torch.rand(2, _SOURCES + 1, _ENTRIES, generator=generator, dtype=torch.float64) + 0.5
    means, precisions = draw[0], draw[1]
    precisions[:-1] += 1.0  # more certain than the prior, which comes last
    if method.prior != "required":
        precisions[-1] = 0.0
    forms: Sequence[Form] = ("sum", "rule")
    for form in forms:
        if all(_follows(form, method, options, means, precisions, weights) for weights in _WEIGHTS):
            return form
    return "other"


def _follows(
    form: Form,
    method: MergeMethod,
    options: Mapping[str, object],
    means: Tensor,
    precisions: Tensor,
    weights: tuple[float, ...],
) -> bool:
    posteriors = [Diagonal.unchecked(mean, precision) for mean, precision in zip(means, precisions, strict=True)]
    alpha = torch.tensor(weights, dtype=torch.float64)
    try:
        merged = _merged(method, options, posteriors, alpha)
    except MergekitBayesError:
        return False
    origin, rest = means[-1], 1 - alpha.sum()
    moves = means[:-1] - origin
    if form == "sum":
        expected = origin + alpha @ moves if method.base == "required" else alpha @ means[:-1]
    else:
        total = alpha @ precisions[:-1] + rest * precisions[-1]
        expected = origin + alpha @ (precisions[:-1] * moves) / total
    return torch.allclose(merged, expected, rtol=1e-9, atol=1e-12)


def _merged(
    method: MergeMethod, options: Mapping[str, object], posteriors: Sequence[Posterior], alpha: Tensor
) -> Tensor:
    found = method.kernel(posteriors[-1], list(posteriors[:-1]), alpha, floor=None, **options)
    return Merge.of(found).posterior.mean
