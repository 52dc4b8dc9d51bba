"""Precisions that do not fit are refused, all reasons at once, before anything is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergekit_bayes.errors import (
    CheckpointError,
    EvaluateError,
    MissingTensorError,
    NonFiniteError,
    NonPositivePrecisionError,
    PlanError,
    ShapeMismatchError,
    SidecarMismatchError,
)
from mergekit_bayes.predict import attach_posterior, read_precisions, sample_posterior
from tests.merge.builders import write_checkpoint, write_precisions
from tests.predict.small_models import classifier, precisions_of, same, weights_in


def edited(**changes: Any) -> dict[str, Any]:
    """Precisions of the classifier with some replaced (`__` stands for a dot), or left out where None."""
    precisions: dict[str, Any] = precisions_of(classifier())
    precisions |= {name.strip("_").replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in precisions.items() if value is not None}


@pytest.mark.parametrize(
    ("precisions", "error", "message"),
    [
        (edited(_head=1.0), SidecarMismatchError, "has precisions for head; expected names of the weights of this Seq"),
        ({}, PlanError, "has precisions for nothing; expected names of the weights .*, such as 0.bias, 0.w"),
        (edited(_0__bias=None), MissingTensorError, "no precision for 0.bias; .* with partial=True"),
        (edited(_0__bias=torch.ones(3)), ShapeMismatchError, r"0.bias: precision of shape \(3,\); expected \(8,\)"),
        (edited(_0__bias=torch.ones(8, 1)), ShapeMismatchError, r"precision of shape \(8, 1\); expected \(8,\)"),
        (edited(_0__bias=torch.ones(8).long()), ShapeMismatchError, "is torch.int64; expected floating point"),
        (edited(_0__bias=torch.zeros(8)), NonPositivePrecisionError, "precision of 0.bias: 8 of 8 entries are not pos"),
        (edited(_0__bias=-2.0), NonPositivePrecisionError, "the smallest is -2; expected all > 0"),
        (edited(_0__bias=torch.full((8,), torch.nan)), NonFiniteError, "0.bias: 8 of 8 entries are not finite"),
        (edited(_0__bias=torch.full((8,), torch.inf)), NonFiniteError, "0.bias: 8 of 8 entries are not finite"),
        (edited(_0__bias="1"), EvaluateError, "precision of 0.bias: is a str; expected a tensor or a number"),
        (edited(_0__bias=True), EvaluateError, "precision of 0.bias: is a bool"),
    ],
)
def test_what_does_not_fit_is_refused(precisions: dict[str, Any], error: type[Exception], message: str) -> None:
    model = classifier()
    before = weights_in(model)
    with pytest.raises(error, match=message):
        attach_posterior(model, precisions)
    assert same(weights_in(model), before)


def test_all_reasons_come_together() -> None:
    with pytest.raises(PlanError) as caught:
        attach_posterior(classifier(), edited(_head=1.0, _0__bias=torch.ones(3), _4__weight=None))
    assert [type(problem) for problem in caught.value.problems] == [
        SidecarMismatchError,
        ShapeMismatchError,
        MissingTensorError,
    ]


def test_parameters_that_need_no_gradient_need_no_precision() -> None:
    model = classifier()
    model[0].requires_grad_(False)
    precisions = {name: value for name, value in precisions_of(model).items() if not name.startswith("0.")}
    before = weights_in(model)
    with sample_posterior(model, precisions, sample=0) as posterior:
        assert posterior.certain == ()
        assert torch.equal(model[0].weight, before["0.weight"])


def test_running_averages_are_no_weights() -> None:
    model = classifier()
    precisions = edited(_1__running_mean=torch.ones(8), _1__running_var=torch.ones(8))
    before = weights_in(model)
    with sample_posterior(model, precisions, sample=0):
        assert torch.equal(model[1].running_var, before["1.running_var"])


def test_a_number_stands_for_a_whole_weight() -> None:
    model = classifier()
    numbers = {name: 4.0 for name, _ in model.named_parameters()}
    tensors = {name: torch.full_like(parameter, 4.0) for name, parameter in model.named_parameters()}
    for precision in (numbers, tensors):
        with sample_posterior(model, precision, sample=0):
            model.register_buffer(f"drawn{len(list(model.buffers()))}", model[0].weight.detach().clone())
    first, second = [buffer for name, buffer in model.named_buffers() if name.startswith("drawn")]
    assert torch.equal(first, second)


def test_an_attached_posterior_passes_through() -> None:
    model = classifier()
    posterior = attach_posterior(model, precisions_of(model))
    assert attach_posterior(model, posterior) is posterior
    with pytest.raises(EvaluateError, match="has no adapter; expected one named mine"):
        attach_posterior(model, precisions_of(model), adapter="mine")


def test_a_parameter_that_is_not_in_memory_is_refused() -> None:
    model = classifier().to("meta")
    with pytest.raises(PlanError, match=r"0.bias: the parameter is offloaded; expected a whole parameter in memory"):
        attach_posterior(model, edited())


class Toy(nn.Module):
    """Tensors as `write_checkpoint` stores them, under their names."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.clone()))


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return {"big": torch.randn(50, 60, generator=torch.Generator().manual_seed(0)), "small": torch.randn(3)}


@pytest.mark.parametrize("shards", [1, 2])
def test_a_sidecar_is_read_from_its_folder_or_file(tensors: dict[str, Tensor], shards: int, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tensors)
    precisions = {name: tensor.exp() for name, tensor in tensors.items()}
    path = write_precisions(folder, precisions, shards=shards)
    model = Toy(tensors)
    drawn = []
    for source in (folder, path, str(folder), precisions, read_precisions(folder)):
        with sample_posterior(model, source, sample=0):
            drawn.append(weights_in(model))
    assert all(same(one, drawn[0]) for one in drawn[1:])


def test_other_weights_than_those_described_are_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tensors)
    precisions = {name: tensor.exp() for name, tensor in tensors.items()}
    write_precisions(folder, precisions)
    trained = Toy({name: tensor + 1e-4 for name, tensor in tensors.items()})
    with pytest.raises(SidecarMismatchError, match=r"describes other values of big, small than the model holds"):
        attach_posterior(trained, folder)
    attach_posterior(trained, read_precisions(folder))
    for narrow in (torch.bfloat16, torch.float16):
        attach_posterior(Toy({name: tensor.to(narrow).float() for name, tensor in tensors.items()}), folder)
        attach_posterior(Toy({name: tensor.to(narrow) for name, tensor in tensors.items()}), folder)


def test_a_sidecar_that_is_not_there_or_not_one_is_refused(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model", tensors)
    with pytest.raises(CheckpointError, match="holds no sidecar"):
        attach_posterior(Toy(tensors), folder)
    with pytest.raises(CheckpointError, match="says nothing about its numbers"):
        attach_posterior(Toy(tensors), folder / "model.safetensors")
