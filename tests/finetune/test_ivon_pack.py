"""Small parameters that take their steps together take the steps they would take alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergekit_bayes import IVON
from mergekit_bayes.errors import FinetuneError
from mergekit_bayes.finetune.ivon import optimizer as optimizer_module
from mergekit_bayes.finetune.ivon import pack as pack_module
from mergekit_bayes.finetune.ivon.pack import Pack, Packs

OPTIONS: dict[str, Any] = {"lr": 0.05, "ess": 1e3, "hess_init": 0.5, "beta2": 0.99, "weight_decay": 1e-3}
SHAPES: list[tuple[int, ...]] = [(64,), (4, 32), (8, 8, 2), (192,), (5, 2), (128,), (64,), ()]


def parameters(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter((0.1 * torch.randn(shape)).to(device, dtype)) for shape in SHAPES]


def gradients(weights: list[nn.Parameter], step: int, without: tuple[int, ...] = ()) -> None:
    generator = torch.Generator().manual_seed(step)
    for index, parameter in enumerate(weights):
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        if index not in without and parameter.requires_grad:
            parameter.grad = 0.3 * parameter.detach() + 0.02 * noise


def train(optimizer: IVON, weights: list[nn.Parameter], steps: range = range(3), without: tuple[int, ...] = ()) -> None:
    for step in steps:
        for _ in range(optimizer.mc_samples):
            with optimizer.sampled_params(train=True):
                gradients(weights, step, without)
        optimizer.step()
        optimizer.zero_grad()


def snapshot(optimizer: IVON, weights: list[nn.Parameter]) -> list[Tensor]:
    state = [optimizer.state[p].get(key, torch.zeros(0)) for p in weights for key in ("momentum", "hess")]
    return [tensor.detach().clone() for tensor in (*weights, *state)]


def packs(optimizer: IVON) -> list[Pack]:
    units = optimizer._packs.units(list(optimizer._trainable()), optimizer.state)
    return [unit for *_, unit in units or [] if isinstance(unit, Pack)]


Scenario = Callable[[list[nn.Parameter]], IVON]


def plainly(weights: list[nn.Parameter]) -> IVON:
    optimizer = IVON(weights, **OPTIONS)
    train(optimizer, weights)
    return optimizer


def with_squared_gradients(weights: list[nn.Parameter]) -> IVON:
    optimizer = IVON(weights, **OPTIONS, hess_approx="gradsq", batch_size=4.0)
    train(optimizer, weights)
    return optimizer


def in_groups(weights: list[nn.Parameter]) -> IVON:
    optimizer = IVON([{"params": weights[:2], "lr": 0.2}, {"params": weights[2:], "weight_decay": 0.1}], **OPTIONS)
    train(optimizer, weights)
    optimizer.param_groups[1]["weight_decay"] = 0.01
    train(optimizer, weights, range(3, 5))
    return optimizer


def without_some_gradients(weights: list[nn.Parameter]) -> IVON:
    optimizer = IVON(weights, **OPTIONS)
    train(optimizer, weights, range(1), without=(1, 2))
    assert not optimizer.state[weights[1]]["momentum"].any()
    train(optimizer, weights, range(1, 3))  # with fewer steps behind them
    return optimizer


def frozen_in_between(weights: list[nn.Parameter]) -> IVON:
    optimizer = IVON(weights, **OPTIONS)
    train(optimizer, weights)
    with optimizer.sampled_params(train=True):
        gradients(weights, 7)
    weights[1].requires_grad_(False)
    optimizer.step()
    optimizer.zero_grad()
    train(optimizer, weights, range(8, 10))
    weights[1].requires_grad_(True)
    weights[2].requires_grad_(False)  # as many as before, but others
    before = [weights[place].detach().clone() for place in (1, 2)]
    train(optimizer, weights, range(10, 12))
    assert [torch.equal(weights[place], before[place - 1]) for place in (1, 2)] == [False, True]
    return optimizer


def in_micro_batches(weights: list[nn.Parameter]) -> IVON:
    optimizer = IVON(weights, **OPTIONS)
    train(optimizer, weights)
    for part in range(3):
        with optimizer.sampled_params(train=True):
            samples = [parameter.detach().clone() for parameter in weights]
            gradients(weights, part)
        with optimizer.sampled_params(train=True):
            assert all(torch.equal(a, b) for a, b in zip(samples, weights, strict=True))
    optimizer.step()
    return optimizer


def loaded(weights: list[nn.Parameter]) -> IVON:
    first = plainly(weights)
    stream = io.BytesIO()
    torch.save(first.state_dict(), stream)
    stream.seek(0)
    optimizer = IVON(weights, **OPTIONS)
    optimizer.load_state_dict(torch.load(stream))
    train(optimizer, weights, range(3, 5))
    return optimizer


def cast(weights: list[nn.Parameter]) -> IVON:
    optimizer = plainly(weights)
    for parameter in weights:
        parameter.data = parameter.data.double()
    train(optimizer, weights, range(3, 5))
    return optimizer


def with_a_state_of_ones_own(weights: list[nn.Parameter]) -> IVON:
    optimizer = plainly(weights)
    optimizer.state[weights[0]]["momentum"] = torch.zeros_like(weights[0], dtype=torch.float32)
    train(optimizer, weights, range(3, 4))
    optimizer.state[weights[1]]["hess"] = torch.full(weights[1].shape, 0.25, device=weights[1].device)
    train(optimizer, weights, range(3, 5))
    return optimizer


def cleared(weights: list[nn.Parameter]) -> IVON:
    optimizer = plainly(weights)
    optimizer.state.clear()
    train(optimizer, weights, range(3, 5))
    assert {state["step"] for state in optimizer.state.values()} == {2}
    return optimizer


def copied(weights: list[nn.Parameter]) -> IVON:
    optimizer, weights[:] = copy.deepcopy((plainly(weights), weights))
    train(optimizer, weights, range(3, 5))
    return optimizer


SCENARIOS = [
    plainly,
    with_squared_gradients,
    in_groups,
    without_some_gradients,
    frozen_in_between,
    in_micro_batches,
    loaded,
    cast,
    with_a_state_of_ones_own,
    cleared,
    copied,
]


NEEDS_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_CUDA)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_together_and_alone_are_the_same(
    scenario: Scenario, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for limit in (1000, 0):
        monkeypatch.setattr(pack_module, "SMALLER_ON_CPU", limit)
        monkeypatch.setattr(pack_module, "SMALLER_ELSEWHERE", limit)
        weights = parameters(dtype, device)
        optimizer = scenario(weights)
        assert bool(packs(optimizer)) == bool(limit)
        results.append(snapshot(optimizer, weights))
    tolerance = 1e-6 if dtype == torch.float32 or scenario is cast else 1e-3
    for together, alone in zip(*results, strict=True):
        torch.testing.assert_close(together, alone, rtol=tolerance, atol=1e-7)


def test_packs_are_neighbours_of_one_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pack_module, "SMALLER_ON_CPU", 1000)
    monkeypatch.setattr(pack_module, "PACK", 400)
    sizes = [64, 128, 64, 192, 7, 64, 2000, 64, 320, 64, 64, 128, 0, 64, 10]
    weights = [nn.Parameter(torch.zeros(size)) for size in sizes]
    weights[2] = nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    optimizer = IVON([{"params": weights[:8]}, {"params": weights[8:]}], **OPTIONS)
    with optimizer.sampled_params():
        pass
    found = [[member.numel() for member in pack.members] for pack in packs(optimizer)]
    # another dtype follows the first two; 7 entries leave a gap, 2000 are many, 320 begin a group, more than 400 a pack
    assert found == [[64, 128], [192, 7], [320, 64], [64, 128], [64, 10]]


def test_within_a_step_nothing_is_taken_together_anew() -> None:
    weights = parameters()
    optimizer = plainly(weights)
    with optimizer.sampled_params(train=True):
        gradients(weights, 7)
        samples = [parameter.detach().clone() for parameter in weights]
    weights[6].requires_grad_(False)
    with torch.no_grad():
        weights[0].add_(1.0)  # the sample of this step is what it was all the same
    with optimizer.sampled_params(train=True):
        assert not packs(optimizer)
        assert all(torch.equal(a, b) for a, b in zip(samples[:6], weights[:6], strict=True))
    weights[6].requires_grad_(True)
    with optimizer.sampled_params(train=True):
        assert torch.equal(weights[1], samples[1])
    optimizer.step()
    assert {state["step"] for state in optimizer.state.values()} == {4}


@pytest.mark.parametrize("options", [{"mc_samples": 2}, {"noise": "per_process"}], ids=str)
def test_nothing_is_packed_where_samples_are_averaged(options: dict[str, Any]) -> None:
    weights = parameters()
    optimizer = IVON(weights, **OPTIONS, **options)
    train(optimizer, weights)
    assert not packs(optimizer)


def test_the_mean_comes_back_bit_for_bit() -> None:
    weights = parameters(torch.bfloat16)
    optimizer = plainly(weights)
    before = [parameter.detach().clone() for parameter in weights]
    with optimizer.sampled_params(train=True):
        assert not any(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))
    with pytest.raises(ZeroDivisionError), optimizer.sampled_params(train=True):
        raise ZeroDivisionError
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_an_interrupted_way_back_still_restores_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = parameters()
    optimizer = plainly(weights)
    before = [parameter.detach().clone() for parameter in weights]
    write, calls = Pack.write_, []

    def interrupting(pack: Pack, flat: Tensor) -> None:
        calls.append(pack)
        if len(calls) == 3:  # the second of two packs takes its sample, then the first one its mean
            raise KeyboardInterrupt
        write(pack, flat)

    monkeypatch.setattr(Pack, "write_", interrupting)
    with pytest.raises(KeyboardInterrupt), optimizer.sampled_params(train=True):
        pass
    assert len(calls) > 3
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_what_was_first_used_to_predict_can_be_trained() -> None:
    weights, others = parameters(), parameters()
    optimizer = IVON(weights, **OPTIONS)
    with torch.inference_mode(), optimizer.sampled_params():
        pass
    train(optimizer, weights)
    expected = snapshot(plainly(others), others)
    assert all(torch.equal(a, b) for a, b in zip(snapshot(optimizer, weights), expected, strict=True))


def test_a_refused_context_can_be_entered_again() -> None:
    weights = parameters()
    optimizer = IVON(weights, **OPTIONS)
    weights[0].ds_id = 7  # type: ignore[attr-defined]
    for _ in range(2):
        with pytest.raises(FinetuneError, match="managed by DeepSpeed ZeRO"), optimizer.sampled_params():
            pass


def test_what_became_trainable_after_the_context_has_no_sample() -> None:
    weights = parameters()
    weights[1].requires_grad_(False)
    optimizer = IVON(weights, **OPTIONS)
    with optimizer.sampled_params(train=True):
        gradients(weights, 0)
    weights[1].requires_grad_(True)
    weights[1].grad = torch.ones_like(weights[1])
    with pytest.raises(FinetuneError, match="became trainable between the context and the step"):
        optimizer.step()


def test_packs_are_kept_from_step_to_step(monkeypatch: pytest.MonkeyPatch) -> None:
    formed = []

    class Counted(Packs):
        def form(self, *arguments: Any) -> Any:
            formed.append(arguments)
            return super().form(*arguments)

    monkeypatch.setattr(optimizer_module, "Packs", Counted)
    weights = parameters()
    optimizer = IVON(weights, **OPTIONS)
    train(optimizer, weights)
    assert len(formed) == 1
    for pack in packs(optimizer):
        own = torch.cat([optimizer.state[member]["hess"].flatten() for member in pack.members])
        assert torch.equal(pack.hess, own)
