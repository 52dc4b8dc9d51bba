"""What cannot be evaluated, or not together, and what is said of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_bayes.errors import DataError, EvaluateError, MergekitBayesError, PlanError, RecipeError
from mergekit_bayes.evaluate.run import evaluate
from tests.evaluate.runs import TABLES, recipe, run


def refusal_of(content: dict[str, Any], kind: type[MergekitBayesError] = PlanError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        run(content, **options)
    return str(caught.value)


def test_samples_without_precisions(llama: Path, tuned: Path) -> None:
    found = refusal_of(recipe([llama, tuned], samples=2))
    assert found.startswith(f"model {llama}: has no precision sidecar, which `samples` needs; expected")
    assert "or `samples: false` for this model" in found
    assert "`prune` needs" in refusal_of(recipe([llama], prune=0.5))
    models = [{"model": str(llama), "samples": False}, str(tuned)]
    assert len(run(recipe(models, samples=2)).results["models"]) == 3


def test_every_model_that_is_not_right_is_named(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    found = refusal_of(recipe([llama, tmp_path / "nothing", tmp_path / "empty"], samples=2)).splitlines()
    assert [any(name in line for line in found) for name in ("nothing", "empty", str(llama))] == [True] * 3


def test_models_of_different_tasks(llama: Path, bert: Path) -> None:
    found = refusal_of(recipe([llama, bert]), EvaluateError)
    assert found.startswith(f"models for different tasks: {llama} is for causal_lm, {bert} for sequence_classification")


def test_metrics_of_another_task(bert: Path) -> None:
    found = refusal_of(recipe([bert], data="labelled", metrics="loss"), RecipeError)
    assert found == (
        "metrics: models of `sequence_classification` have no loss; expected some of accuracy, nll, ece, brier, "
        "selective_accuracy."
    )


def relabelled(bert: Path, folder: Path, names: tuple[str, ...]) -> Path:
    shutil.copytree(bert, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_labels_of_models_that_differ(bert: Path, tmp_path: Path) -> None:
    other = relabelled(bert, tmp_path / "other", ("stone", "animal", "tree"))
    found = refusal_of(recipe([bert, other], data="labelled"))
    assert found == (
        f"model {other}: its labels are stone, animal, tree; those of {bert} are stone, animal, plant; expected one "
        "set of labels for all models and the data"
    )
    found = refusal_of(recipe([other], data={"eval": "labelled", "labels": ["stone", "animal", "plant"]}))
    assert "those of `data.labels` are" in found


def test_labels_in_the_data_that_no_model_knows(bert: Path, tmp_path: Path) -> None:
    other = relabelled(bert, tmp_path / "other", ("stone", "animal", "tree"))
    found = refusal_of(recipe([{"model": str(other), "name": "other"}], data="labelled"), DataError)
    assert found.startswith("data for model other: ")
    assert "the label in `label` is plant; expected one of stone, animal, tree" in found


@pytest.mark.parametrize("rows", [[], [{"text": ""}, {"text": "  "}]])
def test_empty_splits(llama: Path, rows: list[dict[str, str]]) -> None:
    with pytest.raises(DataError, match=r"rows|empty"):
        evaluate(recipe([llama], data=["texts", "nothing"]), tables={**TABLES, "nothing": rows})


def test_a_sidecar_of_other_weights(llama: Path, tuned: Path, tmp_path: Path) -> None:
    shutil.copytree(tuned, tmp_path / "moved")
    path = tmp_path / "moved" / "adapter_model.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    with pytest.raises(MergekitBayesError, match="fingerprint"):
        run(recipe([tmp_path / "moved"], samples=2), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert run(recipe([tmp_path / "moved"])).results, "its mean can be evaluated"


def test_pruning_by_precisions_of_updates(llama: Path, tuned: Path, tmp_path: Path) -> None:
    from mergekit_bayes.estimate.run import estimate_precision

    asked = {"kind": "precision", "model": str(llama), "adapter": str(tuned), "data": {"train": "texts"}}
    estimate_precision({**asked, "estimator": "kfac", "num_examples": 4}, tmp_path / "kfac", tables=TABLES)
    found = refusal_of(recipe([{"model": str(tuned), "precision": str(tmp_path / "kfac")}], prune=0.5))
    assert "has precisions of the adapter's updates (space product), whose entries no file holds" in found
    sampled = run(recipe([{"model": str(tuned), "precision": str(tmp_path / "kfac")}], samples=2)).results
    losses = [data_sets["texts"]["loss"]["value"] for data_sets in sampled["scores"].values()]
    assert len(set(losses)) == 2, "the mean's and the samples'"


def test_a_prior_of_samples(tuned: Path, tmp_path: Path) -> None:
    """In place of that of the sidecar; the tighter it is, the nearer samples are to the mean."""
    found = {}
    for prior in (None, 1e3, 1e12):
        samples = {"count": 2, **({} if prior is None else {"prior": prior})}
        results = run(recipe([tuned], samples=samples)).results
        mean, sampled = (data_sets["texts"]["loss"]["value"] for data_sets in results["scores"].values())
        found[prior] = abs(sampled - mean)
        assert [model.get("prior") for model in results["models"].values()] == [None, prior]
    assert found[1e12] < 1e-4 < found[None]
    assert found[1e3] != found[None]
    shutil.copytree(tuned, tmp_path / "unsaid")
    path = tmp_path / "unsaid" / "precision.safetensors"
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["mergekit_bayes"])
    save_file(load_file(path), path, metadata={"mergekit_bayes": json.dumps({**metadata, "prior_precision": None})})
    refused = refusal_of(recipe([tmp_path / "unsaid"], samples={"count": 2, "prior": 5.0}))
    assert (
        "does not say which prior is in its precisions; expected its prior_precision, or no `samples.prior`" in refused
    )


def test_rows_that_a_model_has_no_place_for(bert: Path) -> None:
    long = [{"text": " ".join(f"w{index % 40}" for index in range(60)), "label": "plant"}]
    with pytest.raises(EvaluateError, match=r"the longest row has 60 tokens, .* has places for 32"):
        evaluate(recipe([bert], data="long"), tables={"long": long})


def test_an_output_that_lies_in_a_model(llama: Path, tuned: Path) -> None:
    with pytest.raises(MergekitBayesError, match="lies inside an input"):
        run(recipe([tuned]), tuned / "scores")
