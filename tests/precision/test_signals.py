"""What is sent backwards has the moments it should have, and is the same wherever a row is seen."""

from __future__ import annotations

import pytest
import torch

from mergekit_bayes.precision.signals import (
    SIGNALS,
    data_label,
    draw_labels,
    random_vector,
    row_generator,
    sampled_label,
)

LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.0, -0.5], dtype=torch.float64)


def hessian(logits: torch.Tensor) -> torch.Tensor:
    """Of the cross-entropy in the logits, by autograd."""
    label = torch.tensor(0)
    return torch.autograd.functional.hessian(lambda z: torch.nn.functional.cross_entropy(z, label), logits)


@pytest.mark.parametrize("signal", [sampled_label, random_vector])
def test_mean_zero_and_the_covariance_of_the_loss(signal) -> None:
    places = 200_000
    sent = signal(LOGITS.expand(places, -1), torch.zeros(places, dtype=torch.int64), row_generator(0, 1))
    torch.testing.assert_close(sent.mean(0), torch.zeros(5, dtype=torch.float64), rtol=0, atol=0.005)
    torch.testing.assert_close(sent.T @ sent / places, hessian(LOGITS), rtol=0, atol=0.005)
    # different places are independent
    torch.testing.assert_close(sent[1:].T @ sent[:-1] / places, torch.zeros(5, 5).double(), rtol=0, atol=0.005)


def test_the_data_label_is_the_gradient_of_the_loss() -> None:
    logits = LOGITS.clone().requires_grad_()
    label = torch.tensor(3)
    torch.nn.functional.cross_entropy(logits, label).backward()
    torch.testing.assert_close(data_label(LOGITS[None], label[None], row_generator(0, 0))[0], logits.grad)


def test_labels_follow_the_probabilities() -> None:
    probabilities = LOGITS.softmax(-1).expand(100_000, -1)
    labels = draw_labels(probabilities, row_generator(0, 0))
    frequencies = torch.bincount(labels, minlength=5) / len(labels)
    torch.testing.assert_close(frequencies.double(), probabilities[0], atol=0.005, rtol=0)


def test_a_class_without_probability_is_never_drawn() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).expand(10_000, -1)
    assert set(draw_labels(probabilities, row_generator(0, 0)).tolist()) == {1, 3}
    certain = torch.tensor([[1.0, 0.0]]).expand(1000, -1)
    assert not draw_labels(certain, row_generator(0, 0)).any()


@pytest.mark.parametrize("signal", SIGNALS.values())
def test_ruled_out_classes_get_no_signal(signal) -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0]] * 50)
    sent = signal(logits, torch.zeros(50, dtype=torch.int64), row_generator(0, 0))
    assert sent.isfinite().all()
    assert not sent[:, 1].any()


def test_more_classes_than_signs_in_a_number() -> None:
    sent = random_vector(torch.zeros(200, 150), torch.zeros(200, dtype=torch.int64), row_generator(0, 0))
    low, high = sent.aminmax(dim=1, keepdim=True)  # with equal probabilities there is one value for each sign
    signs = (sent > (low + high) / 2).float()
    correlations = torch.corrcoef(signs.T).fill_diagonal_(0).abs()
    assert float(correlations.max()) < 0.4


def test_rows_and_seeds_have_streams_of_their_own() -> None:
    drawn = {
        (seed, row): torch.rand(3, generator=row_generator(seed, row)).tolist() for seed in (0, 1) for row in (0, 1)
    }
    assert drawn[0, 1] == torch.rand(3, generator=row_generator(0, 1)).tolist()
    assert len({tuple(values) for values in drawn.values()}) == 4
