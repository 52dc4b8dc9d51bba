"""What must hold of the optimizer around its equations: restoring, resuming, accumulating, skipping."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from mergekit_bayes import IVON
from mergekit_bayes.errors import FinetuneError
from tests.finetune.small_models import OPTIONS, batches, equal, loss_of, small_model, snapshot, train


class _BoomError(Exception):
    pass


def test_the_global_generator_is_left_alone() -> None:
    model = small_model()
    optimizer = IVON(model.parameters(), **OPTIONS)
    before = torch.get_rng_state()
    train(model, optimizer, batches(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_zeroing_between_the_contexts_of_a_step_is_noticed() -> None:
    model = small_model()
    optimizer = IVON(model.parameters(), **OPTIONS)
    (x, y), (x2, y2) = batches(2)
    with optimizer.sampled_params(train=True):
        loss_of(model, x, y).backward()
    with pytest.warns(UserWarning, match="mc_samples"), optimizer.sampled_params(train=True):  # noqa: PT031
        optimizer.zero_grad()
        loss_of(model, x2, y2).backward()


def test_zeroing_between_samples_changes_nothing() -> None:
    data, models = batches(4), [small_model(), small_model()]
    optimizers = [IVON(model.parameters(), **OPTIONS, mc_samples=2) for model in models]
    train(models[0], optimizers[0], data)
    for x, y in data:
        for _ in range(2):
            optimizers[1].zero_grad()
            with optimizers[1].sampled_params(train=True):
                optimizers[1].zero_grad()
                loss_of(models[1], x, y).backward()
        optimizers[1].step()
    assert equal(snapshot(models[0], optimizers[0]), snapshot(models[1], optimizers[1]))


@pytest.mark.parametrize("to_none", [True, False])
def test_zeroing_the_model_between_samples_changes_nothing(to_none: bool) -> None:
    """The averages are out of reach: `.grad` is empty until the last sample is in."""
    data, models = batches(4), [small_model(), small_model()]
    optimizers = [IVON(model.parameters(), **OPTIONS, mc_samples=3) for model in models]
    train(models[0], optimizers[0], data)
    for x, y in data:
        for _ in range(3):
            models[1].zero_grad(set_to_none=to_none)
            with optimizers[1].sampled_params(train=True):
                models[1].zero_grad(set_to_none=to_none)
                loss_of(models[1], x, y).backward()
        optimizers[1].step()
    assert equal(snapshot(models[0], optimizers[0]), snapshot(models[1], optimizers[1]))


def test_zeroing_when_all_samples_are_in_drops_them() -> None:
    data, models = batches(2), [small_model(), small_model()]
    optimizers = [IVON(model.parameters(), **OPTIONS, mc_samples=2) for model in models]
    train(models[0], optimizers[0], data[1:])
    for _ in range(2):
        with optimizers[1].sampled_params(train=True):
            loss_of(models[1], *data[0]).backward()
    optimizers[1].zero_grad()
    with pytest.raises(FinetuneError, match="step after 0 contexts"):
        optimizers[1].step()
    train(models[1], optimizers[1], data[1:])
    assert equal(snapshot(models[0], optimizers[0]), snapshot(models[1], optimizers[1]))


def test_a_sample_that_failed_leaves_nothing_in_the_next() -> None:
    data, models = batches(2), [small_model(), small_model()]
    optimizers = [IVON(model.parameters(), **OPTIONS, mc_samples=2) for model in models]
    train(models[0], optimizers[0], data)
    for x, y in data:
        for sample in range(2):
            if sample == 1:
                with pytest.raises(_BoomError), optimizers[1].sampled_params(train=True):  # noqa: PT012
                    loss_of(models[1], x, y).backward()
                    raise _BoomError
            with optimizers[1].sampled_params(train=True):
                loss_of(models[1], x, y).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
    assert equal(snapshot(models[0], optimizers[0]), snapshot(models[1], optimizers[1]))


def test_squared_gradients_of_micro_batches_cannot_be_added() -> None:
    """The square of a sum is not the sum of squares: with several samples, a context takes all micro-batches."""
    model = small_model()
    optimizer = IVON(model.parameters(), **OPTIONS, mc_samples=2, hess_approx="gradsq")
    x, y = batches(1)[0]

    def sample() -> None:
        with optimizer.sampled_params(train=True):
            loss_of(model, x, y).backward()

    sample()
    sample()
    with pytest.raises(FinetuneError, match="all micro-batches of one sample in one context"):
        sample()


@pytest.mark.parametrize("samples", [1, 2])
def test_clipping_and_unscaling_reach_the_curvature(samples: int) -> None:
    """A gradient scaled by 65536 and unscaled before the step is the gradient itself."""
    models = [small_model(), small_model()]
    optimizers = [IVON(model.parameters(), **OPTIONS, mc_samples=samples) for model in models]
    for x, y in batches(4):
        for model, optimizer, scale in zip(models, optimizers, (1.0, 65536.0), strict=True):
            for _ in range(samples):
                with optimizer.sampled_params(train=True):
                    (loss_of(model, x, y) * scale).backward()
            for parameter in model.parameters():
                parameter.grad.mul_(1 / scale)  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()
    for one, other in zip(snapshot(models[0], optimizers[0]), snapshot(models[1], optimizers[1]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_step_that_is_not_finite_leaves_no_trace(bad: float, samples: int) -> None:
    model = small_model()
    optimizer = IVON(model.parameters(), **OPTIONS, mc_samples=samples)
    data = batches(3)
    train(model, optimizer, data[:1])
    before, counts = snapshot(model, optimizer), [optimizer.state[p]["step"] for p in model.parameters()]
    for _ in range(samples):
        with optimizer.sampled_params(train=True):
            loss_of(model, *data[1]).backward()
            model[2].bias.grad[1] = bad
    optimizer.step()
    optimizer.zero_grad()
    assert equal(snapshot(model, optimizer), before)
    assert [optimizer.state[p]["step"] for p in model.parameters()] == counts
    assert optimizer.param_groups[0]["skipped"] == 1
    train(model, optimizer, data[2:])
    assert all(torch.isfinite(tensor).all() for tensor in snapshot(model, optimizer))


@pytest.mark.parametrize("size", [1e10, 1e30, 3e38])
def test_a_huge_finite_gradient_keeps_the_state_finite(size: float) -> None:
    parameter = nn.Parameter(torch.ones(4))
    optimizer = IVON([parameter], **OPTIONS)
    with optimizer.sampled_params(train=True):
        parameter.grad = torch.full((4,), size)
    optimizer.step()
    assert torch.isfinite(optimizer.state[parameter]["hess"]).all()
    assert torch.isfinite(parameter).all()


def test_mixed_dtypes_in_one_optimizer() -> None:
    model = nn.ModuleList([small_model(), small_model(torch.bfloat16), small_model(torch.float64)])
    optimizer = IVON(model.parameters(), **OPTIONS)
    x, y = batches(1)[0]
    with optimizer.sampled_params(train=True):
        sum(loss_of(each, x, y) for each in model).backward()  # type: ignore[union-attr]
    optimizer.step()
    assert all(optimizer.state[p]["hess"].dtype == torch.float32 for p in model.parameters())
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_h_plus_delta_stays_positive_under_violent_noise() -> None:
    parameter = nn.Parameter(torch.zeros(2000))
    optimizer = IVON([parameter], lr=0.0, ess=1e4, hess_init=0.1, beta2=0.5, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        with optimizer.sampled_params(train=True):
            parameter.grad = torch.randn(2000, generator=generator)
        optimizer.step()
        assert (optimizer.state[parameter]["hess"] + 0.01 > 0).all()


def test_antithetic_samples_are_opposite_and_the_curvature_of_a_quadratic_is_exact_in_g() -> None:
    parameter = nn.Parameter(torch.ones(50))
    optimizer = IVON([parameter], **OPTIONS, mc_samples=2, antithetic=True)
    seen = []
    for _ in range(2):
        with optimizer.sampled_params(train=True):
            seen.append(parameter.detach() - 1)
    torch.testing.assert_close(seen[0], -seen[1], rtol=0, atol=1e-6)
    assert seen[0].abs().max() > 0.01


def test_a_closure_is_called_inside_the_context_once_per_sample() -> None:
    models = [small_model(), small_model(), small_model()]
    optimizers = [IVON(model.parameters(), **OPTIONS, mc_samples=2) for model in models]
    data = batches(3)
    train(models[0], optimizers[0], data)
    for nested in (False, True):
        model, optimizer = models[1 + nested], optimizers[1 + nested]
        for x, y in data:

            def closure(x: Any = x, y: Any = y, model: Any = model, optimizer: IVON = optimizer) -> torch.Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, x, y)
                loss.backward()
                return loss.detach()

            def inside(closure: Any = closure, optimizer: IVON = optimizer) -> torch.Tensor:
                with optimizer.sampled_params(train=True):
                    return closure()

            assert optimizer.step(inside if nested else closure) > 0
        assert equal(snapshot(models[0], optimizers[0]), snapshot(model, optimizer))


def test_adding_a_group_keeps_the_rest_and_its_own_options() -> None:
    model = small_model()
    optimizer = IVON(model[0].parameters(), **OPTIONS)
    reference_model = small_model()
    reference = IVON(reference_model[0].parameters(), **OPTIONS)
    optimizer.add_param_group({"params": list(model[2].parameters()), "hess_init": 2.0, "weight_decay": 0.1})
    with optimizer.sampled_params(), reference.sampled_params():
        assert torch.equal(model[0].weight, reference_model[0].weight)
    train(model, optimizer, batches(2))
    assert optimizer.param_groups[1]["draws"] == optimizer.param_groups[0]["draws"] == 2
    assert (optimizer.state[model[2].weight]["hess"] > 1.5).all()


def test_noise_does_not_depend_on_what_else_is_trained() -> None:
    models = [small_model(), small_model()]
    models[1][0].requires_grad_(False)
    optimizers = [IVON(model.parameters(), **OPTIONS) for model in models]
    with optimizers[0].sampled_params(train=True), optimizers[1].sampled_params(train=True):
        assert torch.equal(models[0][2].weight, models[1][2].weight)
        assert not torch.equal(models[0][0].weight, models[1][0].weight)


def test_what_is_frozen_between_two_contexts_is_left_alone() -> None:
    model = small_model()
    optimizer = IVON(model.parameters(), **OPTIONS)
    with optimizer.sampled_params(train=True):
        loss_of(model, *batches(1)[0]).backward()
    model[0].requires_grad_(False)
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.sampled_params(train=True):
        assert torch.equal(model[0].weight, before[0])
        assert not torch.equal(model[2].weight, before[2])
        loss_of(model, *batches(1)[0]).backward()
    optimizer.step()
    assert equal([p.detach() for p in model[0].parameters()], before[:2])
    assert not torch.equal(model[2].weight, before[2])


def test_prediction_samples_differ_repeat_on_request_and_leave_training_alone() -> None:
    model, other = small_model(), small_model()
    optimizer, plain = IVON(model.parameters(), **OPTIONS), IVON(other.parameters(), **OPTIONS)
    draws = []
    for sample in (None, None, 0, 1):
        with optimizer.sampled_params(sample=sample):
            draws.append(model[0].weight.detach().clone())
    assert not torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])
    assert torch.equal(draws[1], draws[3])
    with optimizer.sampled_params(temperature=0.0):
        assert torch.equal(model[0].weight, other[0].weight)
    data = batches(3)
    train(model, optimizer, data)
    train(other, plain, data)
    assert equal(snapshot(model, optimizer), snapshot(other, plain))


def test_odd_layouts_and_empty_tensors() -> None:
    parameters = [nn.Parameter(torch.randn(4, 6).t()), nn.Parameter(torch.zeros(0)), nn.Parameter(torch.randn(2, 3))]
    optimizer = IVON(parameters, **OPTIONS)
    with optimizer.sampled_params(train=True):
        sum((p**2).sum() for p in parameters).backward()  # type: ignore[union-attr]
        parameters[2].grad = torch.ones(1).expand(2, 3)
    optimizer.step()
    straight = nn.Parameter(parameters[0].detach().clone().contiguous())
    assert straight.shape == (6, 4)
    assert all(torch.isfinite(p).all() for p in parameters)


def test_large_parameters_are_cut_into_blocks_without_a_seam() -> None:
    """The same numbers in one parameter of many blocks and in a transposed one, which is never cut."""
    noise = torch.randn(300, 500, generator=torch.Generator().manual_seed(0))
    results = []
    for transposed in (False, True):
        base = torch.ones(500, 300).t() if transposed else torch.ones(300, 500)
        parameter = nn.Parameter(base)
        optimizer = IVON([parameter], **OPTIONS)
        with optimizer.sampled_params(train=True):
            parameter.grad = noise.clone()
        optimizer.step()
        results.append((parameter.detach(), optimizer.state[parameter]["hess"]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)


def test_survives_deepcopy_and_pickle() -> None:
    model = small_model()
    optimizer = IVON(model.parameters(), **OPTIONS, mc_samples=2)
    train(model, optimizer, batches(1))
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.mc_samples == 2
        with other.sampled_params():
            pass


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lr", -1.0),
        ("lr", math.nan),
        ("ess", 0.0),
        ("ess", math.inf),
        ("hess_init", 0.0),
        ("beta1", 1.0),
        ("beta2", 1.1),
        ("weight_decay", -1e-9),
        ("hess_approx", "prise"),
        ("clip_radius", 0.0),
        ("mc_samples", 0),
        ("batch_size", 0),
        ("noise", "private"),
    ],
)
def test_options_out_of_range_are_refused_by_name(key: str, value: object) -> None:
    with pytest.raises(FinetuneError, match=key):
        IVON([nn.Parameter(torch.ones(1))], **{**OPTIONS, key: value})


def test_misuse_is_an_error_that_says_what_to_do() -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer = IVON([parameter], **OPTIONS)
    with pytest.raises(FinetuneError, match="sampled_params"):
        optimizer.step()
    with pytest.raises(FinetuneError, match="leave the first"), optimizer.sampled_params():
        optimizer.sampled_params().__enter__()
    with pytest.raises(FinetuneError, match="leave the context"), optimizer.sampled_params(train=True):
        optimizer.step()
    with pytest.raises(FinetuneError, match="even"):
        IVON([parameter], **OPTIONS, mc_samples=3, antithetic=True)
    with pytest.raises(FinetuneError, match="shape"):
        optimizer.load_state_dict(_state_of_shape(3))


def _state_of_shape(size: int) -> dict[str, Any]:
    parameter = nn.Parameter(torch.ones(size))
    optimizer = IVON([parameter], **OPTIONS)
    with optimizer.sampled_params():
        pass
    return optimizer.state_dict()


def test_incomplete_samples_are_refused_and_can_be_discarded() -> None:
    model = small_model()
    optimizer = IVON(model.parameters(), **OPTIONS, mc_samples=2)
    before = [p.detach().clone() for p in model.parameters()]
    with optimizer.sampled_params(train=True):
        loss_of(model, *batches(1)[0]).backward()
    with pytest.raises(FinetuneError, match="expected 2"):
        optimizer.step()
    optimizer.discard()
    assert all(p.grad is None for p in model.parameters())
    assert equal([p.detach() for p in model.parameters()], before)
    train(model, optimizer, batches(1))
