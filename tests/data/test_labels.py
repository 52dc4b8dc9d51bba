"""Labelled texts: what the classes are called, which one a label means, and labels that do not fit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from mergekit_bayes.data import TrainingData, collate
from mergekit_bayes.errors import DataError
from tests.data.loading import labelled, load

WORDS = ("good film", "bad film", "the film", "a film")


def classify(tokenizer: Any, found: Sequence[object], **options: Any) -> TrainingData:
    rows = labelled(*[(f"{WORDS[i % 4]} {i}", label) for i, label in enumerate(found)])
    return load(rows, tokenizer, task="sequence_classification", **options)


def classes(data: TrainingData) -> list[object]:
    return [row["labels"] for row in data.train]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["pos", "neg", "pos"], ("neg", "pos")),
        ([10, 2, 1], ("1", "2", "10")),
        (["10", "2", "-1"], ("-1", "2", "10")),
        ([1.0, 0.0], ("0", "1")),
        ([True, False], ("false", "true")),
        ([1, "1", 2], ("1", "2")),
    ],
)
def test_the_names_are_those_in_the_data_in_order(
    classifier_tokenizer: Any, labels: list[object], names: tuple[str, ...]
) -> None:
    data = classify(classifier_tokenizer, labels)
    assert data.labels == names
    plain = [str(label).lower().removesuffix(".0") for label in labels]
    assert classes(data) == [names.index(label) for label in plain]


def test_names_of_the_recipe_decide_the_order(classifier_tokenizer: Any) -> None:
    data = classify(classifier_tokenizer, ["pos", "neg"], labels=["pos", "meh", "neg"])
    assert (data.labels, classes(data)) == (("pos", "meh", "neg"), [0, 2])
    assert data.report.notes[-1] == "no training row has the label meh"


def test_numbers_in_the_data_are_places_among_the_names_of_the_recipe(classifier_tokenizer: Any) -> None:
    assert classes(classify(classifier_tokenizer, [1, 0, "1"], labels=["neg", "pos"])) == [1, 0, 1]
    # unless the names are numbers themselves
    assert classes(classify(classifier_tokenizer, [5, 3], labels=["5", "3"])) == [0, 1]


def test_labels_of_several_data_sets_are_put_together(classifier_tokenizer: Any) -> None:
    rows = labelled(("good film", "b")), labelled(("bad film", "a"))
    data = load(rows, classifier_tokenizer, task="sequence_classification")
    assert (data.labels, classes(data)) == (("a", "b"), [1, 0])


def test_tokens_are_those_of_the_tokenizer(classifier_tokenizer: Any) -> None:
    data = classify(classifier_tokenizer, ["a", "b"])
    expected = classifier_tokenizer(["good film 0", "bad film 1"])
    assert [row["input_ids"] for row in data.train] == expected["input_ids"]
    assert [row["token_type_ids"] for row in data.train] == expected["token_type_ids"]
    assert (data.train.num_units, data.train.num_units_of([1, 1])) == (2, 2)


def test_pairs_of_texts(classifier_tokenizer: Any) -> None:
    long = "the answer " * 10
    rows = [
        {"text": "good film", "text_pair": "bad film", "label": 1},
        {"text": "the film", "text_pair": long, "label": 0},
        {"text": "the film", "text_pair": "", "label": 0},
        {"text": "", "text_pair": "film", "label": 0},
    ]
    data = load(rows, classifier_tokenizer, task="sequence_classification")
    expected = classifier_tokenizer(["good film", "the film"], ["bad film", long], truncation=True, max_length=16)
    assert [row["input_ids"] for row in data.train] == expected["input_ids"]
    assert [row["token_type_ids"] for row in data.train] == expected["token_type_ids"]
    (report,) = data.report.datasets
    assert (report.empty, report.truncated, report.longest) == (2, 1, 25)
    batch = collate(list(data.train), pad_token_id=0, task="sequence_classification")
    assert batch["labels"].tolist() == [1, 0]
    assert batch["token_type_ids"].shape == batch["input_ids"].shape == (2, 16)


def test_a_cut_row_keeps_its_special_tokens(classifier_tokenizer: Any) -> None:
    data = load(labelled(("film " * 30, "a"), ("good", "b")), classifier_tokenizer, task="sequence_classification")
    tokens = data.train[0]["input_ids"]
    assert len(tokens) == 16
    assert (tokens[0], tokens[-1]) == (classifier_tokenizer.cls_token_id, classifier_tokenizer.sep_token_id)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (["a", None], {}, r"memory0, row 1: has no label in `label`; expected one in every row"),
        (["a", ""], {}, r"row 1: has no label"),
        (["a", 0.5], {}, r"row 1: the label in `label` is 0.5 \(float\); expected the name or number of one class"),
        (["a", ["b"]], {}, r"row 1: the label in `label` is \['b'\] \(list\)"),
        (["a", "a"], {}, r"every row of the training data has the label a; expected at least two labels"),
        (["a", 1], {}, r"labels are numbers and names \(1 at memory0, row 1, a at memory0, row 0\)"),
        (
            list(range(60)),
            {},
            r"the column `label` holds 60 different values in 60 rows; expected the names of classes",
        ),
        (
            ["pos", "nge"],
            {"labels": ["neg", "pos"]},
            r"row 1: the label in `label` is nge; .* neg, pos\. Did you mean `neg`",
        ),
        ([0, 2], {"labels": ["neg", "pos"]}, r"row 1: the label in `label` is 2; expected one of neg, pos"),
        ([0, -1], {"labels": ["neg", "pos"]}, r"row 1: the label in `label` is -1; expected one of neg, pos"),
    ],
)
def test_labels_that_do_not_fit(
    classifier_tokenizer: Any, labels: list[object], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        classify(classifier_tokenizer, labels, **options)


def test_many_rows_without_text(classifier_tokenizer: Any) -> None:
    """More than are tokenised at once."""
    rows = [*labelled(*[("", "a")] * 1200), *labelled(("good", "a"), ("bad", "b"))]
    data = load(rows, classifier_tokenizer, task="sequence_classification")
    assert (data.report.datasets[0].empty, len(data.train)) == (1200, 2)


def test_many_classes_are_fine_where_they_repeat(classifier_tokenizer: Any) -> None:
    assert len(classify(classifier_tokenizer, [*range(60)] * 2).labels or ()) == 60


def test_a_label_of_the_held_out_data_that_training_does_not_know(classifier_tokenizer: Any) -> None:
    message = r"memory1, row 1: the label in `label` is c; expected one of a, b"
    with pytest.raises(DataError, match=message):
        classify(classifier_tokenizer, ["a", "b"], eval=labelled(("film", "a"), ("the film", "c")))


@pytest.mark.parametrize(
    ("label", "message"), [(-1, r"has no label in `label`"), (2, r"is 2; expected 0 to 1 \(neg, pos\)")]
)
def test_numbers_of_a_data_set_that_names_its_classes(classifier_tokenizer: Any, label: int, message: str) -> None:
    """As the test sets of benchmarks have -1 where the label is secret."""
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.Value("int64")})
    dataset = datasets.Dataset.from_list(labelled(("a", 1), ("b", label)), features=features)
    names = datasets.ClassLabel(names=["neg", "pos"])
    dataset = dataset.cast_column("label", names) if label == -1 else dataset
    dataset.info.features["label"] = names
    with pytest.raises(DataError, match=rf"memory0, row 1: .*{message}"):
        load({"rows": dataset}, classifier_tokenizer, task="sequence_classification")


def test_packing_has_no_meaning_for_a_classifier(classifier_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"`data.packing` has no meaning for sequence_classification"):
        classify(classifier_tokenizer, ["a", "b"], packing=True)
