"""One optimizer step: the gradient of the mean loss over the whole batch, however the batch is cut."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from mergekit_bayes.data import collate
from mergekit_bayes.finetune.ivon import IVON
from mergekit_bayes.finetune.step import Batch, Stepper, StepResult
from tests.finetune.tiny_rows import labelled_rows, text_rows
from tests.tiny_models import tiny_model

ROWS = text_rows(8)
UNITS = ROWS.num_units
TARGETS = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight", "model.norm.weight"]


def batches(count: int) -> list[Batch]:
    """The eight rows as so many micro-batches, of different numbers of units."""
    size = len(ROWS) // count
    return [collate(ROWS[start : start + size], pad_token_id=0, task="causal_lm") for start in range(0, 8, size)]


def trained(name: str = "llama") -> tuple[Any, list[torch.Tensor]]:
    """A tiny model of which three tensors are trained."""
    model = tiny_model(name)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(key in TARGETS)
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def ivon(parameters: Sequence[torch.Tensor], **options: Any) -> IVON:
    return IVON(parameters, **{"lr": 0.1, "ess": 100.0, "hess_init": 1.0, "beta2": 0.9, **options})


def take(model: Any, optimizer: torch.optim.Optimizer, micro: list[Batch], **options: Any) -> StepResult:
    steps = {"task": "causal_lm", "max_grad_norm": 0.0, **options}
    stepper = Stepper(Accelerator(cpu=True), model, optimizer, **steps)
    return stepper.step(micro, units=UNITS, lr=0.1)


@pytest.mark.parametrize("options", [{}, {"mc_samples": 2}, {"mc_samples": 2, "antithetic": True}])
def test_mean_and_curvature_do_not_depend_on_how_a_batch_is_cut(options: dict[str, Any]) -> None:
    found = []
    for count in (1, 2, 8):
        model, parameters = trained()
        optimizer = ivon(parameters, **options)
        losses = [float(take(model, optimizer, batches(count), max_grad_norm=0.5).loss) for _ in range(3)]
        hess = [optimizer.state[parameter]["hess"] for parameter in parameters]
        found.append((losses, [p.detach().clone() for p in parameters], hess))
    for losses, means, hess in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-5)
        for left, right in zip([*means, *hess], [*found[0][1], *found[0][2]], strict=True):
            torch.testing.assert_close(left, right, rtol=2e-5, atol=1e-6)


def test_the_gradient_is_that_of_the_mean_over_units() -> None:
    """Against the loss of transformers, which is the mean over the targets of a batch."""
    model, parameters = trained()
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    before = [p.detach().clone() for p in parameters]
    result = take(model, optimizer, batches(4))
    other, others = trained()
    (whole,) = batches(1)
    loss = other(**whole).loss
    loss.backward()
    assert float(result.loss) / UNITS == pytest.approx(loss.item(), rel=1e-6)
    for parameter, start, reference in zip(parameters, before, others, strict=True):
        assert reference.grad is not None
        torch.testing.assert_close(parameter.detach(), start - 0.1 * reference.grad, rtol=1e-5, atol=1e-7)
    assert not result.skipped


def test_a_classifier_learns_from_the_mean_over_examples() -> None:
    rows = labelled_rows(6)
    model = tiny_model("bert")
    batch = collate(list(rows), pad_token_id=0, task="sequence_classification")
    expected = model(**batch).loss.item()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    stepper = Stepper(Accelerator(cpu=True), model, optimizer, task="sequence_classification", max_grad_norm=0.0)
    result = stepper.step([batch], units=6, lr=0.0)
    assert float(result.loss) / 6 == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, IVON])
def test_clipping_shortens_the_gradient_before_it_is_used(optimizer_class: Any) -> None:
    model, parameters = trained()
    if optimizer_class is IVON:
        optimizer: torch.optim.Optimizer = ivon(parameters, beta1=0.0, beta2=1.0, ess=1e12)
    else:
        optimizer = torch.optim.SGD(parameters, lr=0.1)
    before = [p.detach().clone() for p in parameters]
    result = take(model, optimizer, batches(2), max_grad_norm=0.01)
    assert float(result.grad_norm) > 0.01
    moved = math.sqrt(sum(float((p.detach() - b).square().sum()) for p, b in zip(parameters, before, strict=True)))
    assert moved == pytest.approx(0.1 * 0.01, rel=0.02)


@pytest.mark.parametrize("kind", ["adamw", "ivon", "ivon, two samples"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
def test_a_gradient_that_is_not_finite_changes_nothing(kind: str, bad: float) -> None:
    model, parameters = trained()
    samples = {"mc_samples": 2} if "two" in kind else {}
    optimizer = torch.optim.AdamW(parameters, lr=0.1) if kind == "adamw" else ivon(parameters, **samples)
    take(model, optimizer, batches(2))
    state = copy.deepcopy(optimizer.state_dict()["state"])
    before = [p.detach().clone() for p in parameters]
    # 3e38 is finite, but the norm of several of them is not
    hook = parameters[0].register_hook(lambda gradient: torch.full_like(gradient, bad))
    result = take(model, optimizer, batches(2), max_grad_norm=1.0)
    hook.remove()
    assert result.skipped
    assert all(torch.equal(p.detach(), b) for p, b in zip(parameters, before, strict=True))
    after = optimizer.state_dict()["state"]
    for index, entry in state.items():
        for key, value in entry.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(after[index][key]))
    assert not take(model, optimizer, batches(2)).skipped


@pytest.mark.parametrize("kind", ["adamw", "ivon", "ivon, two samples"])
def test_a_scaled_loss_gives_the_same_step_and_an_overflow_lowers_the_scale(kind: str) -> None:
    means = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=1024.0)):
        model, parameters = trained()
        samples = {"mc_samples": 2} if "two" in kind else {}
        optimizer = torch.optim.AdamW(parameters, lr=0.1) if kind == "adamw" else ivon(parameters, **samples)
        for _ in range(2):
            assert not take(model, optimizer, batches(2), scaler=scaler, max_grad_norm=0.5).skipped
        means.append([p.detach().clone() for p in parameters])
    for left, right in zip(*means, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)
    assert scaler is not None
    hook = parameters[0].register_hook(lambda gradient: torch.full_like(gradient, math.inf))
    assert take(model, optimizer, batches(2), scaler=scaler).skipped
    hook.remove()
    assert scaler.get_scale() == 512.0
    assert all(torch.equal(p.detach(), before) for p, before in zip(parameters, means[1], strict=True))


def test_a_batch_without_targets_moves_nothing_of_a_sum() -> None:
    model, parameters = trained()
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    empty = collate([], pad_token_id=0, task="causal_lm")
    before = [p.detach().clone() for p in parameters]
    result = take(model, optimizer, [empty])
    assert float(result.loss) == 0
    assert all(torch.equal(p.detach(), b) for p, b in zip(parameters, before, strict=True))
