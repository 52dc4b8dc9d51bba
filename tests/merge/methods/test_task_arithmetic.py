"""Task arithmetic: weights are scaled as mergekit does, and task vectors are added where they lose nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergekit_bayes.errors import MethodError
from mergekit_bayes.merge.registry import get_method
from mergekit_bayes.posterior import Isotropic

TASK_ARITHMETIC = get_method("task_arithmetic")


@pytest.mark.parametrize(
    ("weights", "parameters", "effective"),
    [
        ((1, 3), {}, (1.0, 3.0)),
        ((1, 3), {"normalize": True}, (0.25, 0.75)),
        ((1, 3), {"lambda": 0.5}, (0.5, 1.5)),
        ((1, 3), {"normalize": True, "lambda": 2}, (0.5, 1.5)),
        ((1, -1), {"normalize": True}, (1.0, -1.0)),
        ((3e-9, 6e-9), {"normalize": True}, (3e-9, 6e-9)),
        ((0, 0), {"normalize": True}, (0.0, 0.0)),
        ((-1, -3), {"normalize": True, "lambda": -1}, (-0.25, -0.75)),
    ],
)
def test_effective_weights(
    weights: tuple[float, ...], parameters: dict[str, Any], effective: tuple[float, ...]
) -> None:
    assert TASK_ARITHMETIC.effective_weights(weights, parameters) == effective


def test_parameters_of_mergekit_that_change_nothing_are_accepted() -> None:
    parameters = {"density": 1, "rescale": True, "int8_mask": True, "normalize": 0, "lambda": 1}
    assert TASK_ARITHMETIC.effective_weights((0.5, 0.25), parameters) == (0.5, 0.25)


def test_a_density_that_would_change_something_is_refused() -> None:
    with pytest.raises(MethodError, match=r"`density` is 0\.5; only 1\.0 is supported here"):
        TASK_ARITHMETIC.effective_weights((1.0,), {"density": 0.5})


@pytest.mark.parametrize("weights", [(0.3, 0.3, 0.3), (7.0, -2.0, 1e6)])
def test_sources_equal_to_the_base_return_it_to_the_last_bit(weights: tuple[float, ...]) -> None:
    base = Isotropic(torch.randn(99, generator=torch.Generator().manual_seed(0)), 1.0)
    merged = TASK_ARITHMETIC.kernel(base, [base] * 3, torch.tensor(weights))
    assert torch.equal(merged.mean, base.mean)


def test_small_task_vectors_on_large_weights_are_rounded_once() -> None:
    """Eight tasks at weight one: (1 - 8) theta_0 + sum m_t would be off by several units in the last place."""
    generator = torch.Generator().manual_seed(1)
    base = 1 + torch.rand(999, generator=generator)
    sources = [base + 1e-3 * torch.randn(999, generator=generator) for _ in range(8)]
    merged = TASK_ARITHMETIC.kernel(Isotropic(base, 1.0), [Isotropic(m, 1.0) for m in sources], torch.ones(8))
    wanted = base.double() + sum(m.double() - base.double() for m in sources)
    assert (merged.mean.double() - wanted).abs().max() <= 1.01 * 2**-24 * wanted.abs().max()
