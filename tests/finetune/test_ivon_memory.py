"""What a step keeps and what it borrows, by torch's own account of allocations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from mergekit_bayes import IVON

ENTRIES, TENSORS = 4_000_000, 16
BYTES = 4 * ENTRIES
"""Of the weights, float32."""

SLACK = 5_000_000
"""Noise on its way (4 MiB), blocks of a foreach operation, scalars; the same for any number of weights."""

OPTIONS: dict[str, Any] = {"lr": 0.1, "ess": 1e4, "hess_init": 0.5, "fused": False}


def allocated(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes at the peak and at the end, above those at the beginning."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]  # type: ignore[union-attr]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now


def weights() -> list[nn.Parameter]:
    made = [nn.Parameter(torch.ones(ENTRIES // TENSORS)) for _ in range(TENSORS)]
    for parameter in made:
        parameter.grad = torch.ones_like(parameter)
    return made


def one_step(optimizer: IVON) -> None:
    with optimizer.sampled_params(train=True):
        pass
    optimizer.step()


def test_the_state_is_two_numbers_per_weight() -> None:
    optimizer = IVON(weights(), **OPTIONS)
    _, kept = allocated(lambda: one_step(optimizer))
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.nbytes for tensor in held) == 2 * BYTES
    assert kept == pytest.approx(2 * BYTES, abs=SLACK)


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("contexts", [1, 2])
def test_a_step_borrows_one_more_and_gives_it_back(fused: bool, contexts: int) -> None:
    """The mean while it is away, then the sample; both in the second context of a step."""
    optimizer = IVON(weights(), **{**OPTIONS, "fused": fused})
    one_step(optimizer)

    def step() -> None:
        for _ in range(contexts):
            with optimizer.sampled_params(train=True):
                pass
        optimizer.step()

    peak, kept = allocated(step)
    assert contexts * BYTES <= peak <= contexts * BYTES + SLACK
    assert abs(kept) <= SLACK


def test_a_prediction_borrows_the_mean() -> None:
    optimizer = IVON(weights(), **OPTIONS)
    one_step(optimizer)

    def predict() -> None:
        with optimizer.sampled_params():
            pass

    peak, kept = allocated(predict)
    assert peak <= BYTES + SLACK
    assert abs(kept) <= SLACK


def test_several_samples_borrow_two_averages_more() -> None:
    parameters = weights()
    optimizer = IVON(parameters, **OPTIONS, mc_samples=4)
    gradients = [parameter.grad for parameter in parameters]

    def step() -> None:
        for _ in range(4):
            with optimizer.sampled_params(train=True):
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    step()
    peak, kept = allocated(step)
    assert peak <= 3 * BYTES + SLACK
    assert abs(kept) <= SLACK
