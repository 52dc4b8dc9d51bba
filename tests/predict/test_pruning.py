"""Pruning takes exactly the entries with the lowest signal to noise, says what it amounts to, and can be undone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mergekit_bayes.errors import EvaluateError, NonFiniteError
from mergekit_bayes.predict import prune_posterior
from mergekit_bayes.predict.smallest import smallest_masks
from tests.predict.small_models import classifier, precisions_of, same, weights_in

# few distinct values, so that there are ties; and the extremes of float32
VALUES = st.sampled_from([0.0, -0.0, 1e-45, 1e-38, 0.5, 1.0, 1.0000001, 3.0, 3.4e38, math.inf])


@given(lists=st.lists(st.lists(VALUES, max_size=6), max_size=4), share=st.floats(0, 1))
def test_the_smallest_are_those_a_stable_sort_puts_first(lists: list[list[float]], share: float) -> None:
    tensors = [torch.tensor(values, dtype=torch.float32) for values in lists]
    count = round(share * sum(map(len, lists)))
    found = torch.cat([*smallest_masks(lambda: tensors, count), torch.zeros(0, dtype=torch.bool)])
    everything = torch.cat([*tensors, torch.zeros(0)])
    expected = torch.zeros(len(everything), dtype=torch.bool)
    expected[torch.sort(everything, stable=True).indices[:count]] = True
    assert torch.equal(found, expected)


def flat(model: nn.Module, values: dict[str, Tensor]) -> Tensor:
    return torch.cat([values[name].flatten() for name in sorted(dict(model.named_parameters()))])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_the_lowest_signal_to_noise_is_pruned_over_all_weights_together(share: float) -> None:
    model = classifier()
    precisions, before = precisions_of(model), weights_in(model)
    pruning = prune_posterior(model, precisions, share)
    means, after = flat(model, before), flat(model, weights_in(model))
    signal = means.abs() * flat(model, precisions).sqrt()
    count = round(share * len(means))
    lowest = torch.sort(signal, stable=True).indices[:count]
    expected = means.clone()
    expected[lowest] = 0
    assert torch.equal(after, expected)
    assert (pruning.pruned, pruning.entries) == (count, len(means))
    by_magnitude = set(torch.sort(means.abs(), stable=True).indices[:count].tolist())
    assert pruning.overlap == (len(by_magnitude & set(lowest.tolist())) / count if count else 1.0)
    total = sum(share * before[name].numel() for name, share in pruning.by_weight.items())
    assert total == pytest.approx(count)
    pruning.restore()
    assert same(weights_in(model), before)


def test_as_a_context_it_is_undone_also_after_an_exception() -> None:
    model = classifier(torch.bfloat16)
    with torch.no_grad():
        model[0].weight[0, :2] = torch.tensor([-0.0, 1e-30])
    before = weights_in(model)
    pruning = prune_posterior(model, precisions_of(model), 0.6)
    assert pruning.pruned == round(0.6 * pruning.entries)
    assert not same(weights_in(model), before)
    with pytest.raises(ZeroDivisionError), pruning:
        raise ZeroDivisionError
    assert same(weights_in(model), before)


def test_a_parameter_stored_transposed_is_pruned_in_place() -> None:
    model = nn.Linear(4, 3, bias=False)
    model.weight = nn.Parameter(torch.arange(1.0, 13).view(4, 3).t())
    with prune_posterior(model, {"weight": 1.0}, 0.5):
        assert int((model.weight == 0).sum()) == 6
        assert float(model.weight.detach().sum()) == sum(range(7, 13))
    assert torch.equal(model.weight.detach(), torch.arange(1.0, 13).view(4, 3).t())


def test_with_constant_precision_it_says_that_it_is_magnitude_pruning() -> None:
    model = classifier()
    with prune_posterior(model, {name: 3.0 for name, _ in model.named_parameters()}, 0.3) as pruning:
        assert pruning.overlap == 1.0
        assert pruning.is_magnitude_pruning
        assert "the precision hardly varies, and this is magnitude pruning" in str(pruning)
    with prune_posterior(model, precisions_of(model), 0.3) as pruning:
        assert not pruning.is_magnitude_pruning
        assert "(29.7% would be chance)" in str(pruning)
        assert str(pruning).startswith(
            "pruned 27 of 91 entries (29.7%) by |m| sqrt(S); pruning by |m| alone would take "
        )


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_an_impossible_share_is_refused(share: float) -> None:
    with pytest.raises(EvaluateError, match="expected a number from 0 to 1"):
        prune_posterior(classifier(), precisions_of(classifier()), share)


def test_means_that_are_not_finite_are_refused() -> None:
    model = classifier()
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"0.weight holds NaN or infinity"):
        prune_posterior(model, precisions_of(model), 0.5)
