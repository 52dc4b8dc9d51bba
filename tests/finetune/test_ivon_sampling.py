"""From means to a sample and back, whatever comes between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_bayes.finetune.ivon import sampling as sampling_module
from mergekit_bayes.finetune.ivon import update as update_module
from mergekit_bayes.finetune.ivon.noise import KeyedNoise
from mergekit_bayes.finetune.ivon.sampling import Row, exchange_, perturb_all_

SIZES = (300, 7, 100, 1000, 0, 64)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_module, "BLOCK_ON_CPU", 128)


def pairs() -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    return [torch.randn(size) for size in SIZES], [torch.randn(size) for size in SIZES]


def test_samples_and_means_are_exchanged() -> None:
    parameters, means = pairs()
    samples, kept = [tensor.clone() for tensor in parameters], [tensor.clone() for tensor in means]
    exchange_(dict(zip(parameters, means, strict=True)))
    assert all(torch.equal(a, b) for a, b in zip(parameters, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(means, samples, strict=True))


class _Interrupting:
    """Lets calls pass until one of them, before or after which it interrupts."""

    def __init__(self, function: Any, number: int, *, after: bool) -> None:
        self.function, self.left, self.after = function, number, after

    def __call__(self, *arguments: Any) -> None:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KeyboardInterrupt
        self.function(*arguments)
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [True, False])
def test_an_interrupted_exchange_still_restores_the_means(after: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before or after any copy: what the parameters hold in the end is the mean, all of it."""
    interrupted = 0
    for number in range(1, 40):
        parameters, means = pairs()
        kept = [tensor.clone() for tensor in means]
        with monkeypatch.context() as patch:
            patch.setattr(torch, "_foreach_copy_", _Interrupting(torch._foreach_copy_, number, after=after))
            try:
                exchange_(dict(zip(parameters, means, strict=True)))
            except KeyboardInterrupt:
                interrupted += 1
        assert all(torch.equal(a, b) for a, b in zip(parameters, kept, strict=True))
    assert interrupted > 10


def test_parts_and_batches_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few numbers are drawn at a time, the sample is the same."""
    samples = []
    for limit in (50, 128, 1000, 100_000):
        monkeypatch.setattr(sampling_module, "DRAWN_ON_CPU", limit)
        means, at = [torch.zeros(size) for size in SIZES], 0
        rows = []
        for mean in means:
            rows.append(Row.of(mean, torch.ones_like(mean), at, scale=2.0, weight_decay=0.0))
            at += (mean.numel() + 63) // 64 * 64
        perturb_all_(rows, KeyedNoise(), 17, fusing=False)
        samples.append(torch.cat(means))
    assert all(torch.equal(samples[0], other) for other in samples[1:])
    assert float(samples[0].std()) == pytest.approx(2.0, rel=0.1)
