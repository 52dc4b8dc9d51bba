"""Texts and completions as tokens: what stands around them, what is learned, how long they may be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bayes.data import collate, tokenise
from mergekit_bayes.errors import DataError
from tests.data import tokenizers
from tests.data.loading import load, pairs, texts
from tests.data.tokenizers import byte_level, learned, whole


def test_a_text_is_learned_from_its_second_token_to_its_end(tokenizer: Any) -> None:
    (row,) = load(texts("the lazy dog"), tokenizer).train
    assert row["input_ids"] == [*tokenizer("the lazy dog")["input_ids"], tokenizer.eos_token_id]
    assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_what_the_tokenizer_puts_before_a_text_stays(tokenizer: Any) -> None:
    """And makes its first token learnable."""
    (row,) = load(texts("the lazy dog"), byte_level(bos=True)).train
    assert row["input_ids"] == [3, *tokenizer("the lazy dog")["input_ids"], 0]
    assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_an_end_that_is_there_is_not_doubled_and_none_is_added_where_none_is_wanted(tokenizer: Any) -> None:
    (row,) = load(texts("the dog<|endoftext|>"), tokenizer).train
    assert whole(tokenizer, row) == "the dog<|endoftext|>"
    (row,) = load(texts("the dog"), tokenizer, append_eos=False).train
    assert whole(tokenizer, row) == "the dog"


def test_the_end_is_learned_although_it_is_the_padding_too(tokenizer: Any) -> None:
    """Collators that take labels from tokens lose it, and the model never learns to stop."""
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    data = load(texts("the dog", "the quick brown fox"), tokenizer)
    batch = collate(list(data.train), pad_token_id=0, task="causal_lm")
    length = len(data.train[0]["input_ids"])
    assert batch["labels"][0].tolist() == [*data.train[0]["labels"], *[-100] * (batch["labels"].shape[1] - length)]
    assert batch["labels"][0, length - 1] == 0
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in data.train]


@pytest.mark.parametrize("make", [byte_level, tokenizers.metaspace])
def test_completions_are_learned_and_prompts_are_not(make: Any) -> None:
    tokenizer = make()
    (row,) = load(pairs(("a question: what is the answer?", " the answer is forty two")), tokenizer).train
    assert learned(tokenizer, row).strip() == f"the answer is forty two{tokenizer.eos_token}"
    assert tokenizer.decode(row["input_ids"], skip_special_tokens=True).strip() == (
        "a question: what is the answer? the answer is forty two"
    )


def test_prompts_are_learned_where_the_recipe_says_so(tokenizer: Any) -> None:
    (row,) = load(pairs(("the quick", " fox")), tokenizer, completion_only_loss=False).train
    assert learned(tokenizer, row) == " quick fox<|endoftext|>"


def test_an_empty_prompt_and_an_empty_completion(tokenizer: Any) -> None:
    data = load(pairs(("", "the lazy dog"), ("the", ""), ("the", " \n"), ("the", " fox")), tokenizer)
    assert [learned(tokenizer, row) for row in data.train] == [" lazy dog<|endoftext|>", " fox<|endoftext|>"]
    assert data.report.datasets[0].empty == 2


def test_a_prompt_whose_end_merges_with_the_completion(tokenizer: Any) -> None:
    """`the qui` + `ck fox` is ` quick`, one token: it is learned, and said."""
    data = load(pairs(("the qui", "ck fox"), ("the quick", " fox")), tokenizer)
    assert [learned(tokenizer, row) for row in data.train] == [" quick fox<|endoftext|>", " fox<|endoftext|>"]
    note = "1 rows where the prompt's last token merges with the completion, which is learned with it"
    assert data.report.datasets[0].notes == [note]


WORDS = st.text(st.sampled_from("the quick dog.\n\u00e9"), max_size=20)


@given(WORDS, WORDS.filter(str.strip), st.booleans())
def test_no_part_of_a_completion_is_lost(prompt: str, completion: str, bos: bool) -> None:
    """The tokens are those of the whole text, and all that hold some of the completion are learned."""
    tokenizer = byte_level(bos=bos)
    (row,) = load(pairs((prompt, completion)), tokenizer).train
    assert row["input_ids"] == [*tokenizer(prompt + completion)["input_ids"], 0]
    passed = next(i for i, label in enumerate(row["labels"]) if label != -100)
    before = tokenizer.decode(row["input_ids"][:passed]).removeprefix("<s>")
    # the first token of a row has nothing to be learned from, and may hold some of the completion
    assert prompt.startswith(before) or (passed == 1 and not bos)
    assert -100 not in row["labels"][passed:]


def test_a_tokenizer_without_an_end_of_sequence() -> None:
    tokenizer = byte_level()
    tokenizer.eos_token = None
    with pytest.raises(
        DataError, match=r"the tokenizer has no end-of-sequence token; expected one, or `data.append_eos"
    ):
        load(texts("the dog"), tokenizer)
    assert len(load(texts("the dog"), tokenizer, append_eos=False).train) == 1


def test_long_texts_are_tokenised_in_pieces(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory stays bounded, and the tokens are the same."""
    lines = [f"def f{i}(x):\n\n    return x + {i}  # caf\u00e9\n" for i in range(50)]
    rows = texts("".join(lines), "the dog", *lines, "x" * 300)
    expected = list(load(rows, tokenizer, packing=True).train)
    sizes: list[int] = []
    call = type(tokenizer).__call__

    def counted(self: Any, given: list[str], *args: Any, **options: Any) -> Any:
        sizes.append(sum(map(len, given)))
        return call(self, given, *args, **options)

    monkeypatch.setattr(tokenise, "_AT_ONCE", 100)
    monkeypatch.setattr(type(tokenizer), "__call__", counted)
    pieces = list(load(rows, tokenizer, packing=True).train)
    assert max(sizes) <= 100
    assert [t for row in pieces for t in row["input_ids"]] == [t for row in expected for t in row["input_ids"]]


@pytest.mark.parametrize("policy", ["truncate", "drop", "refuse"])
def test_rows_that_are_too_long(tokenizer: Any, policy: str) -> None:
    rows = texts("the quick brown fox jumps over", "the dog", "the lazy dog the lazy dog")
    lengths = [len(tokenizer(row["text"])["input_ids"]) + 1 for row in rows]
    assert lengths == [7, 3, 7]
    options = {"max_length": 4, "long_rows": policy}
    if policy == "refuse":
        message = (
            r"memory0, row 0: is longer than max_length, as 2 of 3 rows are; the longest has 7 tokens; expected at "
            r"most 4: raise `data.max_length`, or let `data.long_rows` truncate or drop them"
        )
        with pytest.raises(DataError, match=message):
            load(rows, tokenizer, **options)
        return
    data = load(rows, tokenizer, **options)
    (report,) = data.report.datasets
    if policy == "drop":
        assert [whole(tokenizer, row) for row in data.train] == ["the dog<|endoftext|>"]
        assert (report.too_long, report.truncated, report.cut_tokens) == (2, 0, 0)
    else:
        assert [len(row["input_ids"]) for row in data.train] == [4, 3, 4]
        assert whole(tokenizer, data.train[0]) == "the quick brown fox"
        assert (report.too_long, report.truncated, report.cut_tokens) == (0, 2, 6)
    assert report.longest == 7


def test_a_cut_that_leaves_nothing_to_learn(tokenizer: Any) -> None:
    """The prompt alone fills the row."""
    data = load(pairs(("the quick brown fox jumps", " over"), ("the", " dog")), tokenizer, max_length=4)
    (report,) = data.report.datasets
    assert (report.without_target, report.truncated, len(data.train)) == (1, 0, 1)
    with pytest.raises(DataError, match=r"none of its 1 rows can be learned from: 1 with nothing to predict"):
        load(pairs(("the quick brown fox jumps", " over")), tokenizer, max_length=4)


def test_the_limit_of_the_tokenizer_wins_and_is_said() -> None:
    tokenizer = byte_level()
    tokenizer.model_max_length = 4
    data = load(texts("the quick brown fox jumps over"), tokenizer, max_length=100)
    assert (data.max_length, data.train.lengths.tolist()) == (4, [4])
    assert data.report.notes == ("max_length is 4, the most this model's tokenizer allows; 100 was asked for",)
    assert load(texts("the dog"), tokenizer, max_length=3).report.notes == ()
