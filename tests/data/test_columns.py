"""Which format a data set has, which columns are read, and what is said where that is unclear."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_bayes.errors import DataError
from tests.data.loading import load
from tests.data.tokenizers import learned, turns, whole

CHAT = turns("hello", "hi there")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "the dog"}, "text"),
        ({"text": "the dog", "label": 1, "id": 7}, "text"),
        ({"prompt": "a", "completion": "b", "text": "c"}, "prompt_completion"),
        ({"prompt": "a", "messages": CHAT, "text": "c"}, "messages"),
        ({"prompt": "a", "text": "c"}, "text"),
    ],
)
def test_the_columns_tell_the_format(tokenizer: Any, row: dict[str, Any], expected: str) -> None:
    (report,) = load([row], tokenizer).report.datasets
    assert report.format == expected
    assert set(report.unused_columns) == set(row) - {"text": {"text"}, "messages": {"messages"}}.get(
        expected, {"prompt", "completion"}
    )


def test_the_task_decides_between_text_and_labelled_text(classifier_tokenizer: Any) -> None:
    rows = [{"text": "good film", "label": "a"}, {"text": "bad film", "label": "b"}]
    (report,) = load(rows, classifier_tokenizer, task="sequence_classification").report.datasets
    assert report.format == "labelled"


def test_a_format_that_is_named_wins(tokenizer: Any) -> None:
    data = load({"rows": [{"prompt": "a", "completion": "b", "text": "the dog"}], "format": "text"}, tokenizer)
    assert whole(tokenizer, data.train[0]) == "the dog<|endoftext|>"


def test_columns_of_other_names(tokenizer: Any) -> None:
    rows = [{"instruction": "a question:", "output": " forty two", "prompt": "unused"}]
    data = load({"rows": rows, "columns": {"prompt": "instruction", "completion": "output"}}, tokenizer)
    assert whole(tokenizer, data.train[0]) == "a question: forty two<|endoftext|>"
    assert data.report.datasets[0].unused_columns == ("prompt",)


def test_a_column_that_only_some_rows_have(tokenizer: Any) -> None:
    """Rows without it are empty; the others are learned."""
    data = load([{"other": 1}, {"text": "the dog"}, {"text": None}], tokenizer)
    assert (len(data.train), data.report.datasets[0].empty) == (1, 2)


@pytest.mark.parametrize(
    ("entry", "task", "message"),
    [
        (
            {"rows": [{"instruction": "a", "input": "b", "output": "c"}]},
            "causal_lm",
            r"memory0: has the columns instruction, input, output; expected `messages`, or `prompt` and "
            r"`completion`, or `text`; name them in the recipe, as in `columns: \{prompt: instruction, completion: out",
        ),
        ({"rows": [{"conversations": CHAT}]}, "causal_lm", r"as in `columns: \{messages: conversations\}`"),
        (
            {"rows": [{"sentence": "a", "label": 1}]},
            "sequence_classification",
            r"has the columns sentence, label; expected `text` and `label`; .* `columns: \{text: sentence\}`",
        ),
        ({"rows": [{"a": 1}]}, "causal_lm", r"expected `messages`, or `prompt` and `completion`, or `text`$"),
        (
            {"rows": [{"prompt": "a", "completions": "b"}], "format": "prompt_completion"},
            "causal_lm",
            r"has no column `completion`, which the format `prompt_completion` needs; it has prompt, completions\. "
            r"Did you mean `completions`\?",
        ),
        (
            {"rows": [{"text": "a", "bdy": "b"}], "columns": {"text": "body"}},
            "causal_lm",
            r"has no column `body`, which `columns` names; it has text, bdy\. Did you mean `bdy`\?",
        ),
        (
            {"rows": [{"text": "a", "kind": "b"}], "columns": {"label": "kind"}},
            "causal_lm",
            r"`columns` names `label`, which the format `text` has not; its columns are `text`",
        ),
        (
            {"rows": [{"text": "a", "label": 1}], "format": "labelled"},
            "causal_lm",
            r"is read as `labelled`, which causal_lm cannot learn from; expected messages or prompt_completion or text",
        ),
        (
            {"rows": [{"messages": CHAT}], "format": "messages"},
            "sequence_classification",
            r"is read as `messages`, which sequence_classification cannot learn from; expected labelled",
        ),
    ],
)
def test_columns_that_are_not_there(tokenizer: Any, entry: dict[str, Any], task: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(entry, tokenizer, task=task)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": 7}, r"memory0, row 1: `text` is 7 \(int\); expected text"),
        ({"text": ["a"]}, r"row 1: `text` is \['a'\] \(list\); expected text"),
        ({"text": {"en": "a"}}, r"row 1: `text` is \{'en': 'a'\} \(dict\); expected text"),
    ],
)
def test_values_that_are_no_text(tokenizer: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load([{"text": "the dog"}, row], tokenizer)


def test_the_message_names_the_column_of_the_file(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"row 0: `body` is 7 \(int\)"):
        load({"rows": [{"body": 7}], "columns": {"text": "body"}}, tokenizer)


def test_no_row_is_left(tokenizer: Any) -> None:
    message = r"memory0: none of its 3 rows can be learned from: 2 empty, 1 longer than max_length"
    with pytest.raises(DataError, match=message):
        load(
            [{"text": " \n"}, {"text": None}, {"text": "the quick brown fox"}],
            tokenizer,
            max_length=3,
            long_rows="drop",
        )
    with pytest.raises(DataError, match=r"memory1: none of its 1 rows"):
        load([{"text": "the dog"}], tokenizer, eval=[{"text": ""}])


def test_unused_columns_of_other_types_do_not_matter(tokenizer: Any) -> None:
    data = load([{"text": "the dog", "id": 1}, {"text": "the fox", "id": ["x"]}], tokenizer)
    assert [learned(tokenizer, row) for row in data.train] == [" dog<|endoftext|>", " fox<|endoftext|>"]
