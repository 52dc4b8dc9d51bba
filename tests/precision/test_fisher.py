"""The Fisher diagonal against a closed form, an exact loop and its own definition."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from mergekit_bayes.errors import NonFiniteError
from mergekit_bayes.precision.fisher import diagonal_fisher, sample_labels

POSITIONS, FEATURES, CLASSES = 5, 3, 4


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _linear(params, buffers, row):
    return row["x"] @ params["weight"].T + buffers["bias"], row["mask"]


def _linear_problem(rows: int, *, dtype: torch.dtype = torch.float64):
    generator = _generator(3)
    params = {"weight": torch.randn(CLASSES, FEATURES, generator=generator, dtype=dtype)}
    buffers = {"bias": torch.randn(CLASSES, generator=generator, dtype=dtype)}
    batch = {
        "x": torch.randn(rows, POSITIONS, FEATURES, generator=generator, dtype=dtype),
        "mask": (torch.rand(rows, POSITIONS, generator=generator) < 0.7).to(dtype),
    }
    return params, buffers, batch


def _closed_form(params, buffers, batch) -> torch.Tensor:
    """Fisher diagonal of a linear softmax model: sum over positions of p_c (1 - p_c) x_d^2."""
    p = (batch["x"] @ params["weight"].T + buffers["bias"]).softmax(-1)
    return torch.einsum("ntc,ntd,nt->cd", p * (1 - p), batch["x"].square(), batch["mask"])


def _two_layers(params, buffers, row):
    hidden = torch.tanh(row["x"] @ params["first"].T).cumsum(0)
    return hidden @ params["second"].T, row["mask"]


def _two_layer_problem(rows: int):
    generator = _generator(4)
    params = {
        "first": torch.randn(6, FEATURES, generator=generator, dtype=torch.float64),
        "second": torch.randn(CLASSES, 6, generator=generator, dtype=torch.float64),
    }
    return params, {}, _linear_problem(rows)[2]


def test_unbiased_for_the_closed_form_summed_over_tokens():
    params, buffers, batch = _linear_problem(rows=6)
    draws = 30_000
    repeated = {name: value.repeat(draws, *[1] * (value.ndim - 1)) for name, value in batch.items()}
    fisher = diagonal_fisher(_linear, params, buffers, [repeated], generator=_generator(), chunk_size=60_000)
    expected = _closed_form(params, buffers, batch)
    torch.testing.assert_close(fisher.squares["weight"] / draws, expected, rtol=0.03, atol=0.0)


@pytest.mark.parametrize("chunk_size", [7, 16])
def test_equals_a_loop_over_examples(chunk_size):
    params, buffers, batch = _two_layer_problem(rows=7)
    fisher = diagonal_fisher(_two_layers, params, buffers, [batch], generator=_generator(9), chunk_size=chunk_size)

    leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
    rows = [{name: value[n] for name, value in batch.items()} for n in range(7)]
    labels = sample_labels(torch.stack([_two_layers(leaves, buffers, row)[0] for row in rows]), _generator(9))
    expected = {name: torch.zeros_like(value) for name, value in params.items()}
    for row, label in zip(rows, labels, strict=True):
        logits, mask = _two_layers(leaves, buffers, row)
        loss = (cross_entropy(logits, label, reduction="none") * mask).sum()
        for name, gradient in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            expected[name] += gradient**2
    torch.testing.assert_close(fisher.squares, expected, rtol=1e-12, atol=0.0)


def test_differs_from_the_squared_gradient_of_the_batch():
    params, buffers, batch = _linear_problem(rows=50)
    whole = {name: value.unsqueeze(0) for name, value in batch.items()}

    def as_one_row(params, buffers, row):
        logits = row["x"] @ params["weight"].T + buffers["bias"]
        return logits.flatten(0, 1), row["mask"].flatten()

    per_example = diagonal_fisher(_linear, params, buffers, [batch], generator=_generator(1), chunk_size=50)
    batched = diagonal_fisher(as_one_row, params, buffers, [whole], generator=_generator(1))
    assert batched.num_tokens == per_example.num_tokens
    assert not torch.allclose(per_example.squares["weight"], batched.squares["weight"], rtol=0.1)


def test_counts_rows_and_unmasked_positions_over_uneven_batches():
    params, buffers, batch = _linear_problem(rows=11)
    batches = [
        {name: value[:8] for name, value in batch.items()},
        {name: value[8:] for name, value in batch.items()},
    ]
    fisher = diagonal_fisher(_linear, params, buffers, batches, generator=_generator(), chunk_size=3)
    assert fisher.num_examples == 11
    assert fisher.num_tokens == int(batch["mask"].sum())


def test_masked_positions_contribute_nothing():
    params, buffers, batch = _linear_problem(rows=4)
    batch["mask"].zero_()
    fisher = diagonal_fisher(_linear, params, buffers, [batch], generator=_generator())
    assert fisher.num_tokens == 0
    assert torch.equal(fisher.squares["weight"], torch.zeros(CLASSES, FEATURES, dtype=torch.float64))


def test_parameters_are_left_alone_and_half_precision_is_summed_in_float32():
    params, buffers, batch = _linear_problem(rows=4, dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in params.items()}
    fisher = diagonal_fisher(_linear, params, buffers, [batch], generator=_generator())
    assert fisher.squares["weight"].dtype == torch.float32
    torch.testing.assert_close(params, before, rtol=0, atol=0)
    assert params["weight"].grad is None


def test_same_generator_same_result():
    problem = _two_layer_problem(rows=5)
    first, again, other = (
        diagonal_fisher(_two_layers, problem[0], problem[1], [problem[2]], generator=_generator(seed)).squares["first"]
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_labels_follow_the_model():
    logits = torch.tensor([0.0, 1.0, 2.0]).expand(30_000, 1, 3)
    labels = sample_labels(logits, _generator())
    assert labels.shape == (30_000, 1)
    frequencies = torch.bincount(labels.flatten(), minlength=3) / labels.numel()
    torch.testing.assert_close(frequencies, logits[0, 0].softmax(-1), atol=0.01, rtol=0)


@pytest.mark.parametrize("chunk_size", [0, -1])
def test_refuses_a_chunk_without_rows(chunk_size):
    params, buffers, batch = _linear_problem(rows=2)
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        diagonal_fisher(_linear, params, buffers, [batch], generator=_generator(), chunk_size=chunk_size)


def test_refuses_to_estimate_from_nothing():
    params, buffers, _ = _linear_problem(rows=1)
    with pytest.raises(ValueError, match="no rows"):
        diagonal_fisher(_linear, params, buffers, [], generator=_generator())


def test_refuses_tensors_with_different_numbers_of_rows():
    params, buffers, batch = _linear_problem(rows=4)
    batch["mask"] = batch["mask"][:3]
    with pytest.raises(ValueError, match="as many rows in every tensor"):
        diagonal_fisher(_linear, params, buffers, [batch], generator=_generator())


def test_names_the_parameter_that_overflows():
    params, buffers, batch = _linear_problem(rows=2)
    batch["x"] *= 1e300
    params["weight"] *= 1e-300
    with pytest.raises(NonFiniteError, match="weight"):
        diagonal_fisher(_linear, params, buffers, [batch], generator=_generator())
