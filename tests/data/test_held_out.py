"""Held-out rows: which, and that none of them is learned."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bayes.data import Rows, TrainingData
from mergekit_bayes.errors import DataError
from tests.data.loading import labelled, load, pairs, texts
from tests.data.tokenizers import turns, whole

NUMBERS = texts(*[f"the dog {i}" for i in range(40)])


def shown(tokenizer: Any, rows: Rows) -> list[str]:
    return [whole(tokenizer, row).removesuffix("<|endoftext|>") for row in rows]


def held_out(tokenizer: Any, data: TrainingData) -> set[str]:
    return {text for rows in data.eval.values() for text in shown(tokenizer, rows)}


def test_a_share_is_held_out_and_the_rest_is_learned(tokenizer: Any) -> None:
    data = load(NUMBERS, tokenizer, eval_fraction=0.25)
    held = held_out(tokenizer, data)
    assert list(data.eval) == ["memory0"]
    assert len(held) == 10
    assert held | set(shown(tokenizer, data.train)) == {row["text"] for row in NUMBERS}
    assert len(data.train) == 30
    train, evaluated = data.report.datasets
    assert (train.role, train.read, train.held_out, train.rows) == ("train", 40, 10, 30)
    assert (evaluated.role, evaluated.read, evaluated.rows) == ("eval", 10, 10)


def test_which_rows_depends_on_nothing_but_the_rows(tokenizer: Any) -> None:
    """Models of several seeds, orders and lengths of a file are measured on the same rows, so they can be merged."""
    shuffled = random.Random(0).sample(NUMBERS, len(NUMBERS))
    first, second = (held_out(tokenizer, load(rows, tokenizer, eval_fraction=0.25)) for rows in (NUMBERS, shuffled))
    assert first == second
    longer = held_out(tokenizer, load([*NUMBERS, *texts("the fox")], tokenizer, eval_fraction=0.25))
    assert len(first & longer) >= len(first) - 1


@given(st.lists(st.integers(0, 8), min_size=2, max_size=30), st.floats(0.01, 0.99))
def test_nothing_is_both_learned_and_held_out(tokenizer: Any, numbers: list[int], fraction: float) -> None:
    rows = texts(*[f"the dog {number}" for number in numbers])
    if len(set(numbers)) == 1:
        with pytest.raises(DataError, match=r"has no two different rows, of which `data.eval_fraction` could hold one"):
            load(rows, tokenizer, eval_fraction=fraction)
        return
    data = load(rows, tokenizer, eval_fraction=fraction)
    held, learned = held_out(tokenizer, data), set(shown(tokenizer, data.train))
    assert held
    assert learned
    assert not held & learned
    different = len(set(numbers))
    assert len(held) == min(max(1, round(fraction * different)), different - 1)
    assert len(data.train) + sum(map(len, data.eval.values())) == len(rows)


def test_every_data_set_of_a_mixture_gives_its_share_and_no_row_slips_through(tokenizer: Any) -> None:
    one, other = NUMBERS[:20], NUMBERS[10:]
    data = load((one, other), tokenizer, eval_fraction=0.2)
    assert [len(rows) for rows in data.eval.values()] == [4, 6]
    assert list(data.eval) == ["memory0", "memory1"]
    assert not held_out(tokenizer, data) & set(shown(tokenizer, data.train))
    reports = [report for report in data.report.datasets if report.role == "train"]
    assert sum(report.rows + report.held_out + report.also_in_eval for report in reports) == 50


def test_rows_of_given_held_out_data_are_not_learned(tokenizer: Any) -> None:
    data = load(NUMBERS, tokenizer, eval=(NUMBERS[:3], texts("the fox")))
    assert list(data.eval) == ["memory1", "memory2"]
    assert len(data.train) == 37
    assert data.report.datasets[0].also_in_eval == 3
    assert "  of 40 rows read: 3 also in the held-out data" in data.report.lines()


def test_conversations_and_completions_are_compared_as_a_whole(tokenizer: Any) -> None:
    talk = turns("hello", "hi there")
    spelt = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi there"}]
    other = turns("hello", "how are you")
    data = load([{"messages": spelt}, {"messages": other}], tokenizer, eval=[{"messages": talk}])
    assert (len(data.train), data.report.datasets[0].also_in_eval) == (1, 1)
    data = load(pairs(("the", " dog"), ("the", " fox")), tokenizer, eval=pairs(("the", " dog")))
    assert shown(tokenizer, data.train) == ["the fox"]


def test_a_text_is_known_whatever_its_label(classifier_tokenizer: Any) -> None:
    rows = labelled(("good film", "a"), ("bad film", "b"), ("the film", "a"))
    held = labelled(("the film", "b"))
    data = load(rows, classifier_tokenizer, task="sequence_classification", eval=held)
    assert [row["labels"] for row in data.train] == [0, 1]
    data = load(rows, classifier_tokenizer, task="sequence_classification", eval_fraction=0.3)
    assert (len(data.train), len(data.eval["memory0"])) == (2, 1)


def test_nothing_is_left_to_learn(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"memory0: none of its 3 rows is left: 3 also in the held-out data"):
        load(NUMBERS[:3], tokenizer, eval=NUMBERS)


def test_held_out_data_in_two_ways(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"both `data.eval` and `data.eval_fraction`"):
        load(NUMBERS, tokenizer, eval=NUMBERS[:2], eval_fraction=0.1)


def test_names_tell_data_sets_apart(tokenizer: Any) -> None:
    entries = tuple({"path": path, "rows": texts(f"the dog {path}")} for path in ("a/dev.jsonl", "b/dev.jsonl"))
    assert list(load(NUMBERS, tokenizer, eval=entries).eval) == ["a/dev.jsonl", "b/dev.jsonl"]
    entries = tuple({"path": path, "rows": texts(f"the dog {path}")} for path in ("a/dev.jsonl.gz", "b/test.jsonl"))
    assert list(load(NUMBERS, tokenizer, eval=entries).eval) == ["dev", "test"]
    same = {"path": "a/dev.jsonl", "rows": texts("the cat", "the cow")}
    once = {**same, "max_rows": 1}
    assert list(load(NUMBERS, tokenizer, eval=(same, once)).eval) == ["a/dev.jsonl:train#1", "a/dev.jsonl:train#2"]
