"""Precision from the state of Adam: which average belongs to which parameter, in the files of two trainers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergekit_bayes.checkpoint.sidecar import open_sidecar
from mergekit_bayes.errors import CheckpointError, MergekitBayesError
from mergekit_bayes.estimate.run import estimate_precision
from tests.estimate.runs import sidecar_of
from tests.finetune import runs as training

N, BATCH, BETA2 = 1000, 32, 0.9


def recipe(model: Path, state: Path, adapter: Path | None = None, **keys: Any) -> dict[str, Any]:
    content = {
        "kind": "precision",
        "model": str(model),
        "adapter": None if adapter is None else str(adapter),
        "estimator": "adam",
        "optimizer_state": str(state),
        "training_units": N,
        "batch_size": BATCH,
        **keys,
    }
    return {key: value for key, value in content.items() if value is not None}


def expected(average: Tensor, steps: int, beta2: float) -> Tensor:
    """N times the mean of squared batch gradients times the batch size, and the prior."""
    return (N * BATCH * average.double() / (1 - beta2**steps) + N * 1e-8).float()


@pytest.fixture(scope="module")
def trained(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter trained with AdamW by this library."""
    content = training.recipe(
        llama, optimizer=None, training={"max_steps": 3, "save_steps": 3}, data={"train": "texts", "eval": None}
    )
    content["optimizer"] = {"name": "adamw", "lr": 0.01, "beta2": BETA2}
    return training.run(content, tmp_path_factory.mktemp("trained") / "out").folder


def test_a_checkpoint_of_this_trainer(llama: Path, trained: Path, tmp_path: Path) -> None:
    (checkpoint,) = (trained / "checkpoints").iterdir()
    result = estimate_precision(recipe(llama, checkpoint, trained), tmp_path / "out")
    order = json.loads((checkpoint / "checkpoint.json").read_text())["state"]["parameters"]
    state = load_file(checkpoint / "optimizer.safetensors")
    found = sidecar_of(result.folder)
    assert found.keys() == set(order)
    for place, name in enumerate(order):
        torch.testing.assert_close(found[name], expected(state[f"{place}.exp_avg_sq"], 3, BETA2))
    metadata = open_sidecar(result.folder).metadata
    assert (metadata.estimator, metadata.space, metadata.steps, metadata.batch_size) == ("adam", "factor", 3, BATCH)
    assert (metadata.beta2, metadata.num_examples) == (BETA2, N)
    assert sorted(path.name for path in result.folder.iterdir()) == ["precision.safetensors", "precision_report.json"]


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [True, False])
def test_the_state_of_the_hugging_face_trainer(llama: Path, adapter: Path, tmp_path: Path, adapted: bool) -> None:
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    if adapted:
        model = peft.PeftModel.from_pretrained(model, adapter, is_trainable=True)
    tokens = torch.arange(5)
    arguments = transformers.TrainingArguments(
        str(tmp_path / "trainer"), max_steps=2, save_steps=2, weight_decay=0.1, adam_beta2=BETA2, use_cpu=True,
        report_to=[], disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=[{"input_ids": tokens, "labels": tokens}] * 8)
    trainer.train()
    checkpoint = tmp_path / "trainer" / "checkpoint-2"
    for path in llama.glob("tokenizer*"):  # the Trainer saved the model without one
        (checkpoint / path.name).write_bytes(path.read_bytes())
    described = (checkpoint, None) if not adapted else (llama, checkpoint)
    result = estimate_precision(recipe(described[0], checkpoint, described[1]), tmp_path / "out")
    found = sidecar_of(result.folder)
    states = trainer.optimizer.optimizer.state if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer.state
    by_name = {name.replace(".default.", "."): states[p] for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == by_name.keys()
    for name, state in by_name.items():
        torch.testing.assert_close(found[name], expected(state["exp_avg_sq"], 2, BETA2))


def write_state(path: Path, shapes: list[tuple[int, ...]], groups: list[int], **change: Any) -> Path:
    """An `optimizer.pt` with averages of these shapes, numbered through groups of these sizes."""
    entry = {"step": torch.tensor(2.0), "exp_avg": torch.zeros(1)}
    numbers = iter(range(len(shapes)))
    content = {
        "state": {i: {**entry, "exp_avg_sq": torch.full(shape, float(i))} for i, shape in enumerate(shapes)},
        "param_groups": [{"betas": (0.9, BETA2), "params": [next(numbers) for _ in range(n)]} for n in groups],
        **change,
    }
    torch.save(content, path)
    return path


SHAPES = [(4, 16), (16, 4), (4, 16), (8, 4)] * 2


def test_averages_are_given_to_parameters_in_their_order(llama: Path, adapter: Path, tmp_path: Path) -> None:
    state = write_state(tmp_path / "optimizer.pt", SHAPES, [8])
    found = sidecar_of(estimate_precision(recipe(llama, state, adapter), tmp_path / "out").folder)
    values = {name: float(tensor.mean()) for name, tensor in found.items()}
    part = "base_model.model.model.layers.{}.self_attn.{}_proj.lora_{}.weight"
    names = [part.format(layer, side, factor) for layer in (0, 1) for side in "qv" for factor in "AB"]
    assert sorted(values, key=values.__getitem__) == names


@pytest.mark.parametrize(
    ("shapes", "groups", "message"),
    [
        (SHAPES[:7], [7], "of other shapes than the 8 trained parameters in any known order"),
        ([*SHAPES[1:], SHAPES[0]], [8], "of other shapes than"),
        (SHAPES, [4, 4], "in groups of 4, 4, of other shapes than"),
    ],
)
def test_the_state_of_another_model_is_refused(
    llama: Path, adapter: Path, tmp_path: Path, shapes: list[tuple[int, ...]], groups: list[int], message: str
) -> None:
    state = write_state(tmp_path / "optimizer.pt", shapes, groups)
    with pytest.raises(CheckpointError, match=message):
        estimate_precision(recipe(llama, state, adapter), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("ran",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": {}}, "holds no averages of base_model.model.model.layers"),
        ({"param_groups": [{"params": list(range(8))}]}, "cannot be read as the state of Adam: KeyError: 'betas'"),
        ({"other": _Harmful()}, "cannot be read as the state of Adam: UnpicklingError"),
    ],
)
def test_what_is_no_state_of_adam_is_refused(
    llama: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    state = write_state(tmp_path / "optimizer.pt", SHAPES, [8], **change)
    with pytest.raises(CheckpointError, match=message):
        estimate_precision(recipe(llama, state, adapter), tmp_path / "out")
    assert capsys.readouterr().out == "", "no code of a pickle runs"


def test_what_is_not_there_is_refused(llama: Path, adapter: Path, tmp_path: Path) -> None:
    for path, message in ((tmp_path / "none", "is not there"), (tmp_path, "holds no state of an optimizer")):
        with pytest.raises(MergekitBayesError, match=message):
            estimate_precision(recipe(llama, path, adapter), tmp_path / "out")
