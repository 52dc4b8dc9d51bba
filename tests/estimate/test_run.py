"""What a pass leaves behind: a sidecar that belongs, with numbers that an independent loop finds too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_bayes.checkpoint.adapter import open_adapter
from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.index import open_checkpoint
from mergekit_bayes.checkpoint.sidecar import check_sidecar, open_sidecar
from mergekit_bayes.data.order import epoch_order
from mergekit_bayes.data.rows import Encoded, Rows
from tests.estimate.runs import SEEN, TABLES, recipe, run, sidecar_of

FILES = ["convergence.png", "precision.safetensors", "precision_report.json"]


def words(row: dict[str, Any]) -> list[int]:
    """Tokens of a text of the tiny tokenizer, with the end token."""
    return [*(int(word[1:]) for word in row["text"].split()), 46]


def seen_rows(name: str) -> list[dict[str, Any]]:
    """The rows that a pass with seed 0 looks at."""
    import numpy as np

    rows = Rows([Encoded(np.zeros(2, np.int32), label=0) for _ in TABLES[name]], task="sequence_classification")
    return [TABLES[name][index] for index in epoch_order(rows, seed=0, epoch=0)[:SEEN]]


def squared_gradients(model: Any) -> tuple[dict[str, Tensor], int]:
    """Sum over rows of squared gradients of the loss of the data, in float64, row by row; and the predicted tokens."""
    model = model.double()
    total = {n: torch.zeros_like(p) for n, p in model.named_parameters() if p.requires_grad}
    units = 0
    for row in seen_rows("texts"):
        tokens = torch.tensor([words(row)])
        loss = model(input_ids=tokens, labels=tokens).loss * (tokens.shape[1] - 1)
        names = list(total)
        gradients = torch.autograd.grad(loss, [dict(model.named_parameters())[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            total[name] += gradient**2
        units += tokens.shape[1] - 1
    return total, units


def test_the_empirical_fisher_of_a_model_is_that_of_a_loop(llama: Path, tmp_path: Path) -> None:
    import transformers

    result = run(recipe(llama, estimator="empirical_fisher", prior={"weight_decay": 1e-3}), tmp_path / "out")
    expected, units = squared_gradients(transformers.AutoModelForCausalLM.from_pretrained(llama))
    found = sidecar_of(result.folder)
    assert found.keys() == expected.keys() == open_checkpoint(llama).tensors.keys()
    for name, curvature in expected.items():
        torch.testing.assert_close(found[name].double(), curvature + units * 1e-3, rtol=1e-4, atol=1e-7)
    metadata = open_sidecar(result.folder).metadata
    assert (metadata.family, metadata.estimator, metadata.space) == ("diagonal", "empirical_fisher", "full")
    assert (metadata.num_examples, metadata.loss_unit, metadata.weight_decay) == (units, "token", 1e-3)
    assert metadata.prior_precision == pytest.approx(units * 1e-3)
    assert metadata.prior_mean == "base"
    assert sorted(path.name for path in result.folder.iterdir()) == FILES


def test_the_empirical_fisher_of_an_adapter_is_that_of_a_loop(llama: Path, adapter: Path, tmp_path: Path) -> None:
    import peft
    import transformers

    result = run(recipe(llama, adapter, estimator="empirical_fisher"), tmp_path / "out")
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    expected, units = squared_gradients(peft.PeftModel.from_pretrained(base, adapter, is_trainable=True))
    found = sidecar_of(result.folder)
    opened = open_adapter(adapter)
    assert found.keys() == opened.tensors.keys()
    for name, curvature in expected.items():
        stored = name.replace(".default.", ".")
        torch.testing.assert_close(found[stored].double(), curvature + units * 1e-8, rtol=1e-4, atol=1e-7)
    metadata = open_sidecar(result.folder).metadata
    assert (metadata.space, metadata.prior_mean, metadata.adapter_scaling) == ("factor", "zero", 2.0)
    assert metadata.mean_fingerprint == fingerprint(opened.tensors)
    assert metadata.base_fingerprint == fingerprint(open_checkpoint(llama).tensors)


def test_a_gram_in_product_space_is_that_of_the_inputs(llama: Path, adapter: Path, tmp_path: Path) -> None:
    import peft
    import transformers

    run(recipe(llama, adapter, estimator="gram"), tmp_path / "out")
    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    model = peft.PeftModel.from_pretrained(base, adapter).eval()
    inputs: list[Tensor] = []
    module = model.base_model.model.model.layers[0].self_attn.q_proj
    module.register_forward_pre_hook(lambda _, given: inputs.append(given[0].detach().double().squeeze(0)))
    for row in seen_rows("texts"):
        model(input_ids=torch.tensor([words(row)]))
    # the last token of a row predicts nothing, and nothing depends on it
    vectors = torch.cat([each[:-1] for each in inputs])
    found = sidecar_of(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight.input_factor"]
    torch.testing.assert_close(found.double(), (vectors.T @ vectors)[None], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ["kfac", "gram", {"name": "kfac", "eigenvalues": True}])
@pytest.mark.parametrize("adapted", [True, False])
def test_factors_belong_to_what_they_describe(
    llama: Path, gpt2: Path, adapter: Path, tmp_path: Path, estimator: Any, adapted: bool
) -> None:
    model = llama if adapted else gpt2  # whose weights are stored transposed
    run(recipe(model, adapter if adapted else None, estimator=estimator, num_examples=4), tmp_path / "out")
    opened = open_adapter(adapter) if adapted else None
    tensors = open_checkpoint(model).tensors if opened is None else opened.tensors
    sidecar = open_sidecar(tmp_path / "out")
    problems = check_sidecar(
        sidecar,
        mean_tensors=tensors,
        mean_fingerprint=fingerprint(tensors),
        base_fingerprint=sidecar.metadata.base_fingerprint,
        adapter=opened,
    )
    assert problems == []
    assert (sidecar.metadata.family, sidecar.metadata.space) == ("kronecker", "product" if adapted else "full")


def test_classes_are_those_that_the_model_knows(bert: Path, tmp_path: Path) -> None:
    result = run(recipe(bert, task="sequence_classification", estimator="empirical_fisher"), tmp_path / "out")
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert).double()
    expected = torch.zeros_like(model.classifier.bias)
    names = ("stone", "animal", "plant")
    for row in seen_rows("labelled"):
        logits = model(input_ids=torch.tensor([[int(word[1:]) for word in row["text"].split()]])).logits[0]
        wanted = torch.nn.functional.one_hot(torch.tensor(names.index(row["label"])), 3)
        expected += (logits.softmax(0) - wanted).detach() ** 2
    torch.testing.assert_close(sidecar_of(result.folder)["classifier.bias"].double(), expected, rtol=1e-4, atol=1e-6)
    assert (result.report["units"]["unit"], result.report["units"]["num_examples"]) == ("example", SEEN)


def test_the_curvature_is_scaled_to_the_units_of_training(llama: Path, adapter: Path, tmp_path: Path) -> None:
    prior = {"weight_decay": 1e-6}
    few = run(recipe(llama, adapter, prior=prior), tmp_path / "few")
    units = few.report["units"]["seen"]
    many = run(recipe(llama, adapter, prior=prior, training_units=10 * units), tmp_path / "many")
    for name, precision in sidecar_of(many.folder).items():
        torch.testing.assert_close(precision, 10 * sidecar_of(few.folder)[name])
    assert open_sidecar(many.folder).metadata.num_examples == 10 * units


@pytest.mark.parametrize("estimator", ["fisher", {"name": "kfac", "eigenvalues": True}])
def test_groups_find_what_one_pass_finds(llama: Path, adapter: Path, tmp_path: Path, estimator: Any) -> None:
    whole = run(recipe(llama, adapter, estimator=estimator), tmp_path / "whole")
    parts = run(recipe(llama, adapter, estimator=estimator, max_memory="1kB"), tmp_path / "parts")
    assert (whole.report["groups"], parts.report["groups"] > 1) == (1, True)
    one, other = sidecar_of(whole.folder), sidecar_of(parts.folder)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_bfloat16_is_for_diagonals_and_factors_but_not_for_bases(llama: Path, adapter: Path, tmp_path: Path) -> None:
    output = {"precision": "bfloat16"}
    estimator = {"name": "kfac", "eigenvalues": True}
    run(recipe(llama, adapter, output=output, estimator=estimator, num_examples=4), tmp_path / "out")
    dtypes = {name.rpartition(".")[2]: tensor.dtype for name, tensor in sidecar_of(tmp_path / "out").items()}
    assert dtypes == {
        "input_factor": torch.float32,
        "output_factor": torch.float32,
        "eigenvalues": torch.bfloat16,
    }


def test_the_sidecar_is_put_beside_the_weights_which_are_not_touched(
    llama: Path, adapter: Path, tmp_path: Path
) -> None:
    own = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    result = run(recipe(llama, own), None)  # type: ignore[arg-type]
    assert result.folder == own
    assert sorted(path.name for path in own.iterdir()) == sorted([*before, *FILES])
    assert {name: (own / name).read_bytes() for name in before} == before


def test_the_same_recipe_gives_the_same_bytes(llama: Path, adapter: Path, tmp_path: Path) -> None:
    folders = [run(recipe(llama, adapter), tmp_path / name).folder for name in ("one", "two")]
    for name in ("precision.safetensors", "convergence.png"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    other = run(recipe(llama, adapter, seed=1), tmp_path / "three").folder
    assert (other / "precision.safetensors").read_bytes() != (folders[0] / "precision.safetensors").read_bytes()


def test_the_report_and_its_summary(llama: Path, adapter: Path, tmp_path: Path) -> None:
    result = run(recipe(llama, adapter, estimator="kfac", num_examples=100), tmp_path / "out")
    report = json.loads((result.folder / "precision_report.json").read_text())
    assert report == result.report
    assert report["recipe"]["estimator"] == {"name": "kfac", "eigenvalues": False, "max_dimension": 16384}
    assert report["rows"] == {"in_data": 24, "seen": 24, "skipped": []}
    assert report["tensors"] == {"described": 4, "stored": 8}
    (series,) = report["convergence"].values()
    assert [point["units"] for point in series] == sorted({point["units"] for point in series})
    assert all(2 * point["since"] <= point["units"] for point in series)
    assert report["notes"] == ["the data has 24 rows; 100 were asked for", *report["notes"][1:]]
    lines = result.summary().splitlines()
    assert lines[0].startswith(f"{result.folder}: kronecker precision of 4 tensors by kfac, ")
    assert lines[1] == f"  {report['units']['seen']} tokens in 24 rows, scaled to N = {report['units']['seen']}"


def test_too_few_tokens_for_the_rank_of_a_factor_are_said(llama: Path, adapter: Path, tmp_path: Path) -> None:
    result = run(recipe(llama, adapter, estimator="gram", num_examples=1), tmp_path / "out")
    (note,) = [note for note in result.report["notes"] if "full rank" in note]
    assert note.startswith("factors of 4 layers lack full rank: the input factor of model.layers.")
    assert "has 16 dimensions and was seen" in note
    assert "prior (weight_decay 1e-08)" in note
