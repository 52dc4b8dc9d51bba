"""IVON inside what others wrap around optimizers: Accelerate, gradient scalers, torch's checkpoints of state."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from mergekit_bayes import IVON
from mergekit_bayes.errors import FinetuneError
from tests.finetune.small_models import OPTIONS, batches, equal, loss_of, small_model, snapshot, train


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("clip", [False, True])
def test_a_scaled_loss_changes_nothing(samples: int, clip: bool) -> None:
    models = [small_model(), small_model()]
    plain, scaled = (IVON(model.parameters(), **OPTIONS, mc_samples=samples) for model in models)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for x, y in batches(6):
        for _ in range(samples):
            with plain.sampled_params(train=True):
                loss_of(models[0], x, y).backward()
            with scaled.sampled_params(train=True):
                scaler.scale(loss_of(models[1], x, y)).backward()
        if clip:
            scaler.unscale_(scaled)
            for model in models:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        plain.step()
        scaler.step(scaled)
        scaler.update()
        plain.zero_grad()
        scaled.zero_grad()
    for one, other in zip(snapshot(models[0], plain), snapshot(models[1], scaled), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("samples", "zeroed_by"),
    [(1, "optimizer"), (1, "model"), (1, "model, inside"), (2, "optimizer"), (2, "model")],
)
def test_a_step_the_scaler_skipped_leaves_no_trace(samples: int, zeroed_by: str) -> None:
    """The scaler does not call `step` then: what was captured must not join the next step."""
    data = batches(5)
    models = [small_model(), small_model()]
    straight, spoiled = (IVON(model.parameters(), **OPTIONS, mc_samples=samples) for model in models)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    train(models[0], straight, [data[0], data[1], data[3], data[4]])
    for number, (x, y) in enumerate(data):
        for _ in range(samples):
            with spoiled.sampled_params(train=True):
                if zeroed_by == "model, inside":
                    models[1].zero_grad()
                scaler.scale(loss_of(models[1], x, y) * (torch.inf if number == 2 else 1.0)).backward()
        before = snapshot(models[1], spoiled)
        scaler.step(spoiled)
        scaler.update()
        assert equal(before, snapshot(models[1], spoiled)) == (number == 2)
        if zeroed_by == "optimizer":
            spoiled.zero_grad()
        elif zeroed_by == "model":
            models[1].zero_grad()
    for one, other in zip(snapshot(models[0], straight), snapshot(models[1], spoiled), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_zeroing_what_was_not_finite_inside_the_next_context_is_no_loss() -> None:
    model = small_model()
    optimizer = IVON(model.parameters(), **OPTIONS)
    for factor in (torch.inf, 1.0):
        with warnings.catch_warnings(), optimizer.sampled_params(train=True):
            warnings.simplefilter("error")
            optimizer.zero_grad()
            (loss_of(model, *batches(1)[0]) * factor).backward()
    optimizer.step()
    assert optimizer.param_groups[0]["skipped"] == 0


@pytest.fixture
def accelerate() -> Iterator[Any]:
    accelerate = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState

    yield accelerate
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_a_prepared_optimizer_is_found_inside_its_wrapper(accelerate: Any) -> None:
    model = small_model()
    own = IVON(model.parameters(), **OPTIONS)
    prepared = accelerate.Accelerator(cpu=True).prepare(own)
    assert prepared is not own
    assert IVON.of(prepared) is own
    assert IVON.of(own) is own


def test_what_holds_no_ivon_or_trains_copies_is_refused() -> None:
    class DeepSpeedZeroOptimizer:
        optimizer = None

    with pytest.raises(FinetuneError, match="none in SGD"):
        IVON.of(torch.optim.SGD([torch.zeros(1)]))
    with pytest.raises(FinetuneError, match="DeepSpeed"):
        IVON.of(DeepSpeedZeroOptimizer())


@pytest.mark.parametrize(("mark", "engine"), [("ds_id", "DeepSpeed"), ("_fsdp_flattened", "FSDP 1")])
def test_parameters_of_engines_that_train_copies_are_refused(mark: str, engine: str) -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = IVON([parameter], **OPTIONS)
    setattr(parameter, mark, 1)
    with pytest.raises(FinetuneError, match=engine), optimizer.sampled_params(train=True):
        pass
    assert torch.equal(parameter.detach(), torch.ones(2))


def test_accumulating_with_accelerate_is_the_whole_batch(accelerate: Any) -> None:
    """The published pitfall: Accelerate divides the loss, and its zero_grad does nothing between micro-batches."""
    data = batches(4)
    alone = small_model()
    optimizer = IVON(alone.parameters(), **OPTIONS)
    train(alone, optimizer, data)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    bare = small_model()
    model, prepared = accelerator.prepare(bare, IVON(bare.parameters(), **OPTIONS))
    for x, y in data:
        for part in zip(x.chunk(4), y.chunk(4), strict=True):
            with accelerator.accumulate(model):
                with IVON.of(prepared).sampled_params(train=True):
                    accelerator.backward(loss_of(model, *part))
                prepared.step()
                prepared.zero_grad()
    for one, other in zip(snapshot(alone, optimizer), snapshot(bare, IVON.of(prepared)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_accelerate_skips_an_overflow_and_goes_on(accelerate: Any) -> None:
    from accelerate.optimizer import AcceleratedOptimizer

    accelerate.Accelerator(cpu=True)
    model = small_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    prepared = AcceleratedOptimizer(IVON(model.parameters(), **OPTIONS, mc_samples=2), scaler=scaler)
    skipped = []
    for number, (x, y) in enumerate(batches(4)):
        for _ in range(2):
            with IVON.of(prepared).sampled_params(train=True):
                scaler.scale(loss_of(model, x, y) * (torch.inf if number == 1 else 1.0)).backward()
        prepared.step()
        prepared.zero_grad()
        skipped.append(prepared.step_was_skipped)
    assert skipped == [False, True, False, False]
    assert IVON.of(prepared).state[model[0].weight]["step"] == 3
    assert all(bool(torch.isfinite(tensor).all()) for tensor in snapshot(model, IVON.of(prepared)))


def test_torchs_named_state_goes_into_a_fresh_optimizer() -> None:
    """It steps a fresh optimizer with zero gradients and lr, so that there is state to load into."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    data = batches(6)
    whole_model, second_model = small_model(), small_model()
    whole = IVON(whole_model.parameters(), **OPTIONS)
    train(whole_model, whole, data[:3])
    state = get_optimizer_state_dict(whole_model, whole)
    second_model.load_state_dict(whole_model.state_dict())
    second = IVON(second_model.parameters(), **{**OPTIONS, "ess": 1.0})
    set_optimizer_state_dict(second_model, second, state)
    assert second.param_groups[0]["ess"] == OPTIONS["ess"]
    train(whole_model, whole, data[3:])
    train(second_model, second, data[3:])
    assert equal(snapshot(whole_model, whole), snapshot(second_model, second))
