"""Multiple-choice questions: the layouts they come in, what becomes of their rows, and how they become tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from mergekit_bayes.data import Row, TrainingData, collate
from mergekit_bayes.data.questions import parted
from mergekit_bayes.errors import DataError
from tests.data import tokenizers
from tests.data.loading import load

QUESTION = "the quick brown"
CHOICES = ["fox jumps", "dog", "answer is forty two"]
RIGHT = 2
ASKED = {"question": QUESTION, "choices": CHOICES, "answer": RIGHT}


def read(rows: object, tokenizer: Any, **options: Any) -> TrainingData:
    return load(rows, tokenizer, task="multiple_choice", **options)


def texts(tokenizer: Any, row: Row) -> list[tuple[str, str]]:
    """What stands before each choice of a question, and what is predicted."""
    found = []
    for piece in parted(row):
        labels = piece["labels"]
        assert isinstance(labels, list)
        start = next(place for place, label in enumerate(labels) if label != -100)
        assert labels[start:] == piece["input_ids"][start:]
        found.append((tokenizer.decode(piece["input_ids"][:start]), tokenizer.decode(labels[start:])))
    return found


def test_a_question_and_its_choices(tokenizer: Any) -> None:
    data = read([ASKED, {"question": "a film", "choices": ["good", "bad"], "answer": "A"}], tokenizer)
    assert data.train.task == "multiple_choice"
    assert not data.train.packed
    assert data.labels is None
    first, second = data.train
    assert texts(tokenizer, first) == [(QUESTION, f" {choice}") for choice in CHOICES]
    assert texts(tokenizer, second) == [("a film", " good"), ("a film", " bad")]
    assert (first["answer"], second["answer"]) == (2, 0)
    assert first["choice_bytes"] == [len(choice) for choice in CHOICES], "the space between is not theirs"
    assert data.train.counts.tolist() == [3, 2]
    assert data.train.units.tolist() == [1, 1]
    assert data.train.widths.tolist() == [max(first["segments"]), max(second["segments"])]
    (report,) = data.report.datasets
    assert (report.rows, report.units, report.losses, report.notes) == (2, 2, "", [])


def test_tokens_are_those_of_completions(tokenizer: Any) -> None:
    (row,) = read([ASKED], tokenizer).train
    pairs = [{"prompt": QUESTION, "completion": f" {choice}"} for choice in CHOICES]
    assert parted(row) == list(load(pairs, tokenizer, append_eos=False).train)


def test_special_tokens_at_the_start_stay() -> None:
    tokenizer = tokenizers.byte_level(bos=True)
    (row,) = read([ASKED], tokenizer).train
    assert {before for before, _ in texts(tokenizer, row)} == {f"<s>{QUESTION}"}


@pytest.mark.parametrize(
    ("separator", "expected"), [("", "fox jumps"), ("\nA: ", "\nA: fox jumps"), (None, " fox jumps")]
)
def test_what_stands_between(tokenizer: Any, separator: str | None, expected: str) -> None:
    (row,) = read({"rows": [ASKED], "separator": separator}, tokenizer).train
    assert "".join(texts(tokenizer, row)[0]) == QUESTION + expected
    assert row["choice_bytes"][0] == len("fox jumps")


def test_bytes_are_those_of_utf_8(tokenizer: Any) -> None:
    (row,) = read([{**ASKED, "choices": ["é", "日本", "a"]}], tokenizer).train
    assert row["choice_bytes"] == [2, 6, 1]


# as data sets of the hub have it: rows, what the recipe says of their columns, and the texts of the choices
LAYOUTS: Mapping[str, tuple[dict[str, object], dict[str, object], list[str]]] = {
    "hellaswag": (
        {"ind": 4, "activity_label": "Roof", "ctx": QUESTION, "endings": CHOICES, "label": "2", "split": "val"},
        {"question": "ctx", "choices": "endings", "answer": "label"},
        CHOICES,
    ),
    "arc": (
        {"id": "x", "question": QUESTION, "choices": {"text": CHOICES, "label": ["A", "B", "C"]}, "answerKey": "C"},
        {"answer": "answerKey"},
        CHOICES,
    ),
    "arc with numbers": (
        {"question": QUESTION, "choices": {"text": CHOICES, "label": ["1", "2", "3"]}, "answerKey": "3"},
        {"answer": "answerKey"},
        CHOICES,
    ),
    "mmlu": ({"question": QUESTION, "subject": "anatomy", "choices": CHOICES, "answer": 2}, {}, CHOICES),
    "piqa": (
        {"goal": QUESTION, "sol1": "dog", "sol2": "fox", "label": 1},
        {"question": "goal", "choices": ["sol1", "sol2"], "answer": "label"},
        ["dog", "fox"],
    ),
    "sciq": (
        {"question": QUESTION, "distractor1": "fox", "distractor2": "cat", "correct_answer": "dog"},
        {"choices": ["distractor1", "distractor2", "correct_answer"], "answer": "correct_answer"},
        ["fox", "cat", "dog"],
    ),
}


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_the_hub(name: str, kind: str, tokenizer: Any, tmp_path: Path) -> None:
    row, columns, choices = LAYOUTS[name]
    folder = tmp_path / "set"
    table = datasets.Dataset.from_list([row, row])
    match kind:
        case "jsonl":
            folder.mkdir()
            (folder / "part.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(row)}\n")
        case "parquet":
            folder.mkdir()
            table.to_parquet(folder / "part.parquet")
        case _:
            table.save_to_disk(str(folder))
    data = read({"path": str(folder), "columns": columns}, tokenizer)
    for found in data.train:
        assert texts(tokenizer, found) == [(QUESTION, f" {choice}") for choice in choices]
        assert found["answer"] == len(choices) - 1


def test_answers_that_are_classes(tokenizer: Any) -> None:
    feature = datasets.Features(
        question=datasets.Value("string"),
        choices=datasets.List(datasets.Value("string")),
        answer=datasets.ClassLabel(names=["A", "B", "C"]),
    )
    table = datasets.Dataset.from_list([ASKED], features=feature)
    assert read({"rows": table}, tokenizer).train[0]["answer"] == RIGHT


@pytest.mark.parametrize("answer", [2, 2.0, "2", "C", "answer is forty two", " answer is forty two "])
def test_ways_to_name_the_answer(answer: object, tokenizer: Any) -> None:
    assert read([{**ASKED, "answer": answer}], tokenizer).train[0]["answer"] == RIGHT


def test_a_text_that_is_its_own_letter_is_no_riddle(tokenizer: Any) -> None:
    row = {**ASKED, "choices": ["A", "B", "C"], "answer": "B"}
    assert read([row], tokenizer).train[0]["answer"] == 1


LABELLED = {"text": CHOICES, "label": ["1", "2", "3"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"answer": 3},
            r"row 0: the answer in `answer` is 3, which is none of the 3 choices; expected an index from 0",
        ),
        ({"answer": "D"}, "expected an index from 0 to 2, a letter from A to C, or the text of a choice"),
        ({"answer": "cat"}, "is 'cat', which is none of the 3 choices"),
        ({"answer": True}, r"is True \(bool\); expected an index"),
        ({"answer": [1]}, r"is \[1\] \(list\); expected an index"),
        ({"answer": None}, "has no answer in `answer`; expected one in every row"),
        ({"answer": -1}, "has no answer in `answer`"),
        ({"answer": ""}, "has no answer in `answer`"),
        (
            {"choices": ["B", "A"], "answer": "A"},
            r"may be choice 0 \('B'\) or choice 1 \('A'\), counted from 0; expected",
        ),
        ({"choices": ["3", "1", "0"], "answer": "1"}, None),
        ({"choices": ["1", "0", "3"], "answer": "1"}, r"which may be choice 0 \('1'\) or choice 1 \('0'\)"),
        ({"choices": ["fox", "fox"], "answer": "fox"}, r"may be choice 0 \('fox'\) or choice 1 \('fox'\)"),
        ({"choices": LABELLED, "answer": 0}, "none of the 3 choices; expected one of the labels 1, 2, 3, or the text"),
        ({"choices": LABELLED, "answer": "B"}, "expected one of the labels 1, 2, 3"),
        (
            {"choices": {**LABELLED, "label": ["1", "2"]}, "answer": "1"},
            "has 3 texts and 2 labels; expected a label for",
        ),
        (
            {"choices": {**LABELLED, "label": ["1", "2", "1"]}, "answer": "1"},
            "labels in `choices` are 1, 2, 1; expected",
        ),
        (
            {"choices": {**LABELLED, "label": "ABC"}, "answer": "A"},
            "the labels in `choices` are 'ABC'; expected a list",
        ),
        ({"choices": ["fox"], "answer": 0}, "`choices` has one choice; expected two or more"),
        ({"choices": "fox, dog"}, r"`choices` is 'fox, dog' \(str\); expected a list of texts, or a mapping"),
        ({"choices": ["fox", 3], "answer": 0}, r"choice 1 of `choices` is 3 \(int\); expected text"),
        ({"question": 3}, r"`question` is 3 \(int\); expected text"),
    ],
)
def test_rows_that_are_no_questions(change: dict[str, object], message: str | None, tokenizer: Any) -> None:
    row = {**ASKED, **change}
    if message is None:
        assert read([row], tokenizer).train[0]["answer"] == 1
        return
    with pytest.raises(DataError, match=message):
        read([row], tokenizer)


def test_empty_rows_are_counted(tokenizer: Any) -> None:
    empty = [
        {"question": " "},
        {"question": None},
        {"choices": []},
        {"choices": None},
        {"choices": ["fox", " ", "dog"]},
    ]
    (report,) = read([ASKED, *({**ASKED, **change} for change in empty)], tokenizer).report.datasets
    assert (report.read, report.rows, report.empty) == (6, 1, 5)
    with pytest.raises(DataError, match="none of its 1 rows can be learned from: 1 empty"):
        read([{**ASKED, "question": ""}], tokenizer)


def test_a_row_may_have_fewer_choices_than_there_are_columns(tokenizer: Any) -> None:
    rows = [
        {"question": QUESTION, "a": "fox", "b": "dog", "c": None, "answer": 1},
        {"question": QUESTION, "a": "fox", "b": None, "c": "dog", "answer": 0},
        {"question": QUESTION, "a": "fox", "b": "dog", "c": "cat", "answer": "C"},
    ]
    data = read({"rows": rows, "columns": {"choices": ["a", "b", "c"]}}, tokenizer)
    assert data.train.counts.tolist() == [2, 3]
    assert data.report.datasets[0].empty == 1, "nobody knows which of the others an answer counts"


def width(tokenizer: Any, choice: str) -> int:
    return len(tokenizer(f"{QUESTION} {choice}")["input_ids"])


@pytest.mark.parametrize("bos", [False, True])
def test_long_questions_lose_their_start(bos: bool) -> None:
    tokenizer = tokenizers.byte_level(bos=bos)
    widest = max(width(tokenizer, choice) for choice in CHOICES)
    whole = read([ASKED], tokenizer).train[0]
    data = read([ASKED], tokenizer, max_length=widest - 2)
    (row,) = data.train
    assert max(row["segments"]) == widest - 2
    kept = parted(row)[0]["input_ids"][:1] if bos else []
    for before, after in zip(parted(whole), parted(row), strict=True):
        assert after["input_ids"] == kept + before["input_ids"][2 + len(kept) :], "of all choices the same is cut"
        assert after["labels"] == before["labels"][2:]
    assert (row["answer"], row["choice_bytes"]) == (whole["answer"], whole["choice_bytes"])
    (report,) = data.report.datasets
    assert (report.truncated, report.cut_tokens, report.longest) == (1, 2 * len(CHOICES), widest)


def test_questions_that_cannot_be_cut_are_left_out(tokenizer: Any) -> None:
    short = {"question": "a", "choices": ["b", "c"], "answer": 0}
    limit = len(tokenizer(" answer is forty two")["input_ids"])
    (report,) = read([ASKED, short], tokenizer, max_length=limit).report.datasets
    assert (report.rows, report.too_long, report.truncated) == (1, 1, 0)
    (dropped,) = read([ASKED, short], tokenizer, max_length=limit, long_rows="drop").report.datasets
    assert (dropped.rows, dropped.too_long) == (1, 1)
    with pytest.raises(DataError, match=r"is longer than max_length, as 1 of 2 rows are; the longest has \d+ tokens"):
        read([ASKED, short], tokenizer, max_length=limit, long_rows="refuse")


def test_a_choice_without_a_token_of_its_own_is_counted(tokenizer: Any) -> None:
    joined = {"question": "t", "choices": ["he", "x"], "answer": 0}
    assert len(tokenizer("the")["input_ids"]) == 1
    (report,) = read({"rows": [joined, ASKED], "separator": ""}, tokenizer).report.datasets
    assert (report.rows, report.without_target) == (1, 1)
    assert report.notes == ["1 choices whose first token holds the end of their question too, which is scored with it"]


def test_a_batch_of_questions(tokenizer: Any) -> None:
    rows = read([ASKED, {**ASKED, "choices": ["fox", "dog"], "answer": 1}], tokenizer).train
    batch = collate(list(rows), pad_token_id=0, task="multiple_choice")
    assert batch["choices"].tolist() == [3, 2]
    assert batch["answers"].tolist() == [2, 1]
    pieces = [piece for row in rows for piece in parted(row)]
    alone = collate(pieces, pad_token_id=0, task="causal_lm")
    assert all(torch.equal(batch[name], alone[name]) for name in ("input_ids", "labels", "attention_mask"))


def test_fingerprints_tell_questions_apart(tokenizer: Any) -> None:
    base = read([ASKED], tokenizer).train.fingerprint
    others = [{"answer": 0}, {"choices": CHOICES[:2], "answer": 0}, {"question": "the"}]
    found = {read([{**ASKED, **change}], tokenizer).train.fingerprint for change in others}
    assert len(found | {base}) == 4
    assert read([ASKED], tokenizer).train.fingerprint == base


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (
            [{"question": "a", "answer": 0}],
            {},
            "has the columns question, answer; expected `question` and `choices` and",
        ),
        (
            [{"ctx": "a", "endings": ["b", "c"], "label": 0}],
            {},
            r"name them in the recipe, as in `columns: \{question: ctx, choices: endings, answer: label\}`",
        ),
        ([ASKED], {"packing": True}, "`data.packing` has no meaning for multiple_choice, where a row is one example"),
        ([ASKED], {"labels": ["a", "b"]}, "`data.labels` has no meaning for multiple_choice, where every row has its"),
    ],
)
def test_data_that_are_no_questions(rows: object, options: dict[str, Any], message: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=message):
        read(rows, tokenizer, **options)


def test_questions_are_nothing_to_learn_from(tokenizer: Any) -> None:
    with pytest.raises(
        DataError, match="which holds questions to evaluate with `task: multiple_choice` and nothing to"
    ):
        load({"rows": [ASKED], "format": "multiple_choice"}, tokenizer)
    with pytest.raises(DataError, match="; multiple-choice questions are evaluated with `task: multiple_choice`"):
        load([ASKED], tokenizer)
    with pytest.raises(DataError, match="`separator` has no effect on the format `text`; remove it"):
        load({"rows": [{"text": "a film"}], "separator": "-"}, tokenizer)
