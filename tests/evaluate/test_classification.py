"""Scores of classifiers against scikit-learn, and what is said of labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sklearn.calibration import calibration_curve
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from tests.evaluate.runs import TABLES, recipe, run


@torch.no_grad()
def predictions(folder: Path, data: str = "labelled") -> tuple[torch.Tensor, list[int]]:
    """Probabilities, a row at a time, and right classes."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(row["text"], return_tensors="pt") for row in TABLES[data]]
    logits = [model(input_ids=row["input_ids"], attention_mask=row["attention_mask"]).logits[0] for row in rows]
    labels = [model.config.label2id[row["label"]] for row in TABLES[data]]
    return torch.stack(logits).double().softmax(-1), labels


def test_all_scores(bert: Path) -> None:
    result = run(recipe([bert], data=["labelled", "other labelled"], coverage=[0.5, 1.0]))
    assert result.results["task"] == "sequence_classification"
    for data in ("labelled", "other labelled"):
        probabilities, labels = predictions(bert, data)
        guessed, numbers = probabilities.argmax(-1).tolist(), probabilities.numpy()
        right = torch.tensor(guessed) == torch.tensor(labels)
        expected = {
            "accuracy": accuracy_score(labels, guessed),
            "nll": log_loss(labels, numbers, labels=range(3)),
            "brier": brier_score_loss(labels, numbers, labels=range(3), scale_by_half=False),
            "selective_accuracy@1": accuracy_score(labels, guessed),
        }
        order = probabilities.amax(-1).argsort(descending=True)
        count = len(labels) // 2
        if len(labels) % 2 == 0:  # otherwise the edge counts by half
            expected["selective_accuracy@0.5"] = float(right[order[:count]].double().mean())
        for metric, value in expected.items():
            assert result.value(str(bert), data, metric) == pytest.approx(value, rel=1e-5), metric
        bins = result.results["reliability"][str(bert)][data]
        gaps = sum(each["rows"] * abs(each["confidence"] - each["accuracy"]) for each in bins) / len(labels)
        assert result.value(str(bert), data, "ece") == pytest.approx(gaps)


def test_the_reliability_diagram(bert: Path) -> None:
    result = run(recipe([bert], data="labelled", bins=5))
    probabilities, labels = predictions(bert)
    right = probabilities.argmax(-1) == torch.tensor(labels)
    accuracy, confidence = calibration_curve(right.int().numpy(), probabilities.amax(-1).numpy(), n_bins=5)
    bins = result.results["reliability"][str(bert)]["labelled"]
    assert [each["confidence"] for each in bins] == pytest.approx(confidence.tolist(), rel=1e-5)
    assert [each["accuracy"] for each in bins] == pytest.approx(accuracy.tolist())
    assert sum(each["rows"] for each in bins) == len(labels)


def test_the_order_of_labels_changes_nothing(bert: Path, other_bert: Path) -> None:
    result = run(recipe([bert, {"model": str(other_bert), "name": "other"}], data="labelled"))
    for metric, found in result.results["differences"]["other"]["labelled"].items():
        assert found["difference"] == pytest.approx(0, abs=1e-6), metric
    assert result.results["notes"] == []


def test_one_class_only_is_said(bert: Path) -> None:
    result = run(recipe([bert], data=["labelled", "one class"]))
    (note,) = result.results["notes"]
    assert note == "one class: every row has the label plant; its scores say nothing of the others"
    probabilities, labels = predictions(bert, "one class")
    expected = accuracy_score(labels, probabilities.argmax(-1).tolist())
    assert result.value(str(bert), "one class", "accuracy") == pytest.approx(expected)


def test_metrics_that_were_asked_for(bert: Path) -> None:
    scores = run(recipe([bert], data="labelled", metrics=["brier", "selective_accuracy"], coverage=0.25)).results
    assert [*scores["scores"][str(bert)]["labelled"]] == ["brier", "selective_accuracy@0.25"]


def unnamed(bert: Path, folder: Path) -> Path:
    """A copy whose files count their labels instead of naming them."""
    import shutil

    shutil.copytree(bert, folder, ignore=shutil.ignore_patterns("precision*"))
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    names = {str(index): f"LABEL_{index}" for index in range(3)}
    (folder / "config.json").write_text(json.dumps(config | {"id2label": names, "label2id": {}}))
    return folder


def test_labels_without_names_get_them_from_the_recipe(bert: Path, tmp_path: Path) -> None:
    folder = unnamed(bert, tmp_path / "unnamed")
    labels = ["stone", "animal", "plant"]
    named = run(recipe([folder], data={"eval": "labelled", "labels": labels}))
    assert named.value(str(folder), "labelled", "nll") == run(recipe([bert], data="labelled")).value(
        str(bert), "labelled", "nll"
    )


def test_labels_without_names_are_not_guessed(bert: Path, tmp_path: Path) -> None:
    folder = unnamed(bert, tmp_path / "unnamed")
    with pytest.raises(Exception, match=r"the label in `label` is animal; expected one of 0, 1, 2"):
        run(recipe([folder], data="labelled"))
