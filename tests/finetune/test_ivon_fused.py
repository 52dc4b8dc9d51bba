"""Compiled updates give the numbers of the foreach ones, and are compiled only where that pays."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from mergekit_bayes import IVON
from mergekit_bayes.errors import FinetuneError
from mergekit_bayes.finetune.ivon import fused as fused_module
from mergekit_bayes.finetune.ivon.fused import decide, failure
from mergekit_bayes.finetune.ivon.pack import Pack

OPTIONS: dict[str, Any] = {"lr": 0.05, "ess": 1e4, "hess_init": 0.5, "beta2": 0.99, "weight_decay": 1e-3}
LARGE = fused_module.SMALLEST_ON_CPU


def parameters(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[nn.Parameter]:
    """Large, odd, transposed and small, which two are left to foreach; two that are small alone, but not together."""
    torch.manual_seed(0)
    shapes: list[tuple[int, ...]] = [(LARGE,), (LARGE + 3,), (3, LARGE), (200, 300)]
    made = [nn.Parameter((0.1 * torch.randn(shape)).to(device, dtype)) for shape in shapes]
    made.append(nn.Parameter((0.1 * torch.randn(300, 200)).to(device, dtype).t()))
    made.append(nn.Parameter(torch.zeros(10, dtype=dtype, device=device)))
    return made + [nn.Parameter((0.1 * torch.randn(LARGE // 2)).to(device, dtype)) for _ in range(2)]


def train(optimizer: IVON, weights: list[nn.Parameter], steps: range = range(4)) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for _ in range(optimizer.mc_samples):
            with optimizer.sampled_params(train=True):
                for parameter in weights:
                    noise = torch.randn(parameter.shape, generator=generator).to(parameter)
                    parameter.grad = 0.3 * parameter.detach() + 0.02 * noise
        optimizer.step()
        optimizer.zero_grad()


def packs(optimizer: IVON) -> list[list[int]]:
    """Sizes of the members of every pack."""
    units = optimizer._packs.units(list(optimizer._trainable()), optimizer.state) or []
    return [[member.numel() for member in unit.members] for *_, unit in units if isinstance(unit, Pack)]


def snapshot(optimizer: IVON, weights: list[nn.Parameter]) -> list[torch.Tensor]:
    return [
        tensor
        for p in weights
        for tensor in (p.detach().clone(), optimizer.state[p]["momentum"].clone(), optimizer.state[p]["hess"].clone())
    ]


def agree(change: dict[str, Any], dtype: torch.dtype, device: str = "cpu") -> None:
    results = []
    for fused in (False, True):
        weights = parameters(dtype, device)
        optimizer = IVON(weights, **{**OPTIONS, **change}, fused=fused)
        train(optimizer, weights)
        results.append(snapshot(optimizer, weights))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance / 100)


CHANGES: list[dict[str, Any]] = [
    {},
    {"clip_radius": 0.02, "weight_decay": 0.0},
    {"mc_samples": 2, "antithetic": True, "beta1": 0.0, "debias": False},
    {"hess_approx": "gradsq", "batch_size": 4.0, "rescale_lr": False},
]


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_compiled_and_foreach_agree_to_rounding(change: dict[str, Any]) -> None:
    assert failure("cpu") is None
    agree(change, torch.float32)


@pytest.mark.slow
def test_compiled_and_foreach_agree_for_bfloat16_weights() -> None:
    agree({}, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("change", CHANGES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_and_foreach_agree_on_a_gpu(
    change: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused_module, "SMALLEST_ELSEWHERE", LARGE)
    agree(change, dtype, "cuda")


@pytest.mark.slow
def test_compiled_steps_resume_bit_for_bit_and_leave_the_global_generator_alone() -> None:
    weights, others = parameters(), parameters()
    before = torch.get_rng_state()
    optimizer = IVON(weights, **OPTIONS, fused=True)
    train(optimizer, weights, range(2))
    assert packs(optimizer) == [[LARGE // 2] * 2]
    resumed = IVON(others, **OPTIONS, fused=True)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for own, other in zip(others, weights, strict=True):
        own.data.copy_(other.data)
    train(optimizer, weights, range(2, 4))
    train(resumed, others, range(2, 4))
    for one, other in zip(snapshot(optimizer, weights), snapshot(resumed, others), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_compiled_steps_skip_what_is_not_finite_and_bound_what_is_huge() -> None:
    weights = parameters()
    optimizer = IVON(weights, **OPTIONS, fused=True)
    train(optimizer, weights, range(1))
    before = snapshot(optimizer, weights)
    for bad in (math.inf, 3e38):
        with optimizer.sampled_params(train=True):
            for parameter in weights:
                parameter.grad = torch.full_like(parameter, bad)
        optimizer.step()
        if bad == math.inf:
            assert all(torch.equal(a, b) for a, b in zip(before, snapshot(optimizer, weights), strict=True))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in snapshot(optimizer, weights))
    assert optimizer.param_groups[0]["skipped"] == 1


def test_nothing_is_compiled_for_few_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_module, "failure", lambda _: pytest.fail("compiled"))
    assert decide(None, [torch.zeros(3_900_000)]) is False
    assert decide(None, [torch.zeros(LARGE - 1) for _ in range(300)]) is False  # many, but all small
    assert decide(False, [torch.zeros(8_000_000)]) is False


def test_many_weights_are_compiled_where_a_compiler_works(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [torch.zeros(100_000) for _ in range(50)]
    monkeypatch.setattr(fused_module, "failure", lambda _: None)
    assert decide(None, many) is True
    assert decide(None, [torch.zeros(1000, 5000).t()]) is False  # not dense
    monkeypatch.setattr(fused_module, "failure", lambda _: "no compiler")
    assert decide(None, many) is False
    with pytest.raises(FinetuneError, match=r"no compiler.*install a C"):
        decide(True, many)
    optimizer = IVON([nn.Parameter(torch.zeros(LARGE))], **OPTIONS, fused=True)
    with pytest.raises(FinetuneError, match="no compiler"), optimizer.sampled_params():
        pass
    with pytest.raises(FinetuneError, match="fused"):
        IVON([nn.Parameter(torch.zeros(1))], **OPTIONS, fused="yes")  # type: ignore[arg-type]


def test_a_failing_compiler_is_found_out_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("cc: not found\nmore")

    monkeypatch.setattr(fused_module, "fused_perturb_", broken)
    failure.cache_clear()
    try:
        assert failure("cpu") == "RuntimeError: cc: not found"
        failure.cache_clear()
        monkeypatch.setattr(fused_module, "fused_perturb_", lambda *_, **__: None)
        monkeypatch.setattr(fused_module, "fused_update_", lambda *_, **__: None)
        assert failure("cpu") == "it gives other numbers than without"
    finally:
        failure.cache_clear()
