"""A model holds a sample of its posterior while the context lasts, and exactly its mean after."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mergekit_bayes.errors import EvaluateError, NumericalError
from mergekit_bayes.predict import attach_posterior, sample_posterior
from tests.predict.small_models import classifier, precisions_of, same, weights_in


class _BoomError(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_mean_returns_bit_for_bit_and_in_place(dtype: torch.dtype) -> None:
    model = classifier(dtype)
    with torch.no_grad():
        model[0].weight[0, 0] = -0.0
    before, places = weights_in(model), [p.data_ptr() for p in model.parameters()]
    with sample_posterior(model, precisions_of(model), sample=0):
        inside = weights_in(model)
        assert [p.data_ptr() for p in model.parameters()] == places
        assert [p.dtype for p in model.parameters()] == [dtype] * len(places)
    assert not any(torch.equal(inside[name], before[name]) for name, _ in model.named_parameters())
    assert all(torch.equal(inside[name], before[name]) for name, _ in model.named_buffers())
    assert same(weights_in(model), before)
    assert [p.data_ptr() for p in model.parameters()] == places


def test_the_mean_returns_after_an_exception_and_the_model_can_be_sampled_again() -> None:
    model = classifier()
    before, precisions = weights_in(model), precisions_of(model)
    with pytest.raises(_BoomError), sample_posterior(model, precisions, sample=0):
        raise _BoomError
    assert same(weights_in(model), before)
    with sample_posterior(model, precisions, sample=0):
        assert not same(weights_in(model), before)


def test_the_mean_returns_when_drawing_itself_fails() -> None:
    model = classifier()
    before, precisions = weights_in(model), precisions_of(model)
    precisions["4.weight"][0, 0] = 1e-38
    with pytest.raises(NumericalError, match=r"4.weight: precision 1e-38 at temperature 1e\+06"):
        sample_posterior(model, precisions, sample=0, temperature=1e6).__enter__()
    assert same(weights_in(model), before)


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_samples_have_the_moments_of_the_posterior(temperature: float) -> None:
    count = 200_000
    model = nn.Linear(count, 1, bias=False)
    precision = torch.linspace(0.5, 8, count)[None]
    mean = model.weight.detach().double().clone()
    with sample_posterior(model, {"weight": precision}, sample=0, temperature=temperature):
        standard = (model.weight.detach().double() - mean) * (precision.double() / temperature).sqrt()
    # standard errors of the first four moments of a normal are 1, sqrt 2, sqrt 15, sqrt 96 over sqrt n
    for moment, wanted, spread in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs((standard**moment).mean().item() - wanted) < 5 * spread / count**0.5


def test_a_sample_depends_on_seed_sample_and_name_alone() -> None:
    model, other = classifier(), classifier()
    precisions = precisions_of(model)
    with sample_posterior(model, precisions, sample=3, seed=7):
        drawn = weights_in(model)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    backwards = dict(reversed(precisions.items()))
    with sample_posterior(other, backwards, sample=3, seed=7):
        assert same(weights_in(other), drawn)
    assert torch.equal(torch.get_rng_state(), state)
    alone = attach_posterior(model, {"4.weight": precisions["4.weight"]}, partial=True)
    with sample_posterior(model, alone, sample=3, seed=7):
        assert torch.equal(model[4].weight, drawn["4.weight"])
        assert not torch.equal(model[0].weight, drawn["0.weight"])
    for sample, seed in ((2, 7), (3, 8)):
        with sample_posterior(model, precisions, sample=sample, seed=seed):
            assert not torch.equal(model[4].weight, drawn["4.weight"])


def test_weights_of_one_shape_have_numbers_of_their_own() -> None:
    model = nn.ParameterList([nn.Parameter(torch.zeros(1000)) for _ in range(3)])
    with sample_posterior(model, {str(place): 1.0 for place in range(3)}, sample=0):
        together = torch.stack([parameter.detach() for parameter in model])
    assert torch.corrcoef(together).triu(1).abs().max() < 5 / math.sqrt(1000)


def test_temperatures_scale_the_same_numbers() -> None:
    model = nn.Linear(50, 4, dtype=torch.float64)
    precisions = {"weight": 2.0, "bias": 3.0}
    mean = model.weight.detach().clone()
    moves = []
    for temperature in (1.0, 4.0):
        with sample_posterior(model, precisions, sample=0, temperature=temperature):
            moves.append(model.weight.detach() - mean)
    torch.testing.assert_close(moves[1], 2 * moves[0])
    with sample_posterior(model, precisions, sample=0, temperature=0):
        assert torch.equal(model.weight, mean)


def test_a_bfloat16_sample_is_the_rounded_sample() -> None:
    narrow, wide = nn.Linear(64, 64, dtype=torch.bfloat16), nn.Linear(64, 64)
    wide.load_state_dict({name: tensor.float() for name, tensor in narrow.state_dict().items()})
    for model in (narrow, wide):
        with sample_posterior(model, {"weight": 5.0, "bias": 5.0}, sample=0):
            model.drawn = model.weight.detach().clone()
    assert torch.equal(narrow.drawn, wide.drawn.bfloat16())


def test_gradients_can_be_taken_at_a_sample() -> None:
    model = nn.Linear(3, 1)
    with sample_posterior(model, {"weight": 1.0, "bias": 1.0}, sample=0):
        weight = model.weight.detach().clone()
        model(torch.ones(2, 3)).square().sum().backward()
        expected = 2 * 2 * (weight.sum() + model.bias.detach())
    assert torch.allclose(model.weight.grad, expected.expand(1, 3))


def test_samples_do_not_nest() -> None:
    model = classifier()
    precisions = precisions_of(model)
    with sample_posterior(model, precisions, sample=0) as posterior:
        inside = weights_in(model)
        with pytest.raises(EvaluateError, match="holds a sample already"), sample_posterior(model, posterior, sample=1):
            pass
        assert same(weights_in(model), inside)


@pytest.mark.parametrize("temperature", [-1.0, math.nan, math.inf])
def test_impossible_temperatures_are_refused(temperature: float) -> None:
    model = classifier()
    with pytest.raises(NumericalError, match="temperature is"):
        sample_posterior(model, precisions_of(model), sample=0, temperature=temperature).__enter__()


def test_a_negative_sample_is_refused() -> None:
    model = classifier()
    with pytest.raises(EvaluateError, match="sample is -1"), sample_posterior(model, precisions_of(model), sample=-1):
        pass


def test_a_posterior_stays_attached_when_the_model_changes_its_type() -> None:
    model = classifier()
    posterior = attach_posterior(model, precisions_of(model))
    model.double()
    before = weights_in(model)
    with sample_posterior(model, posterior, sample=0):
        assert not same(weights_in(model), before)
        assert model[0].weight.dtype == torch.float64
    assert same(weights_in(model), before)


def test_the_exact_predictive_variance_of_linear_regression() -> None:
    """Conjugate model: y = w x + noise of variance 1 and prior N(0, 1/S_0) give S = S_0 + sum x^2, m = sum x y / S."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, generator=generator, dtype=torch.float64)
    y = 1.5 * x + torch.randn(40, generator=generator, dtype=torch.float64)
    precision = 2.0 + float(x.square().sum())
    model = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.fill_(float((x * y).sum()) / precision)
    posterior = attach_posterior(model, {"weight": precision})
    at = torch.tensor([[0.5], [3.0]], dtype=torch.float64)
    predicted = []
    for sample in range(4000):
        with torch.no_grad(), sample_posterior(model, posterior, sample=sample):
            predicted.append(model(at)[:, 0])
    variance = torch.stack(predicted).var(0)
    exact = at[:, 0].square() / precision
    # the relative standard error of a variance from n normal samples is sqrt(2 / n)
    assert ((variance / exact - 1).abs() < 4 * math.sqrt(2 / 4000)).all()
    centre = torch.stack(predicted).mean(0) - model.weight.item() * at[:, 0]
    assert (centre.abs() < 4 * (exact / 4000).sqrt()).all()
