"""Models that cut text into other tokens: what compares, and that this is said."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tokenizers
import transformers

from mergekit_bayes.data.rows import Encoded, Rows
from mergekit_bayes.evaluate.encodings import tokenizer_identity
from mergekit_bayes.predict.rows import target_bytes
from tests.data.tokenizers import byte_level
from tests.evaluate.runs import recipe, run


@pytest.fixture(scope="module")
def letters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights with a token for each character."""
    folder = tmp_path_factory.mktemp("letters") / "letters"
    shutil.copytree(llama, folder)
    known = ["<unk>", "<eos>", " ", "w", *"0123456789"]
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(known)}, unk_token="<unk>")
    split = tokenizers.Tokenizer(model)
    split.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    split.decoder = tokenizers.decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=split, eos_token="<eos>", unk_token="<unk>", pad_token="<unk>"
    )
    fast.save_pretrained(folder)
    return folder


def test_bits_per_byte_compare_and_losses_do_not(llama: Path, letters: Path) -> None:
    results = run(recipe([llama, {"model": str(letters), "name": "letters"}])).results
    assert [*results["differences"]["letters"]["texts"]] == ["bits_per_byte"]
    found = results["differences"]["letters"]["texts"]["bits_per_byte"]
    assert found["low"] <= found["difference"] <= found["high"]
    (note,) = results["notes"]
    assert note == (
        f"letters: has another tokenizer than {llama}; loss and perplexity per token do not compare, bits per byte do"
    )
    assert len(results["data"][0]["units"]) == 2


def test_rows_that_are_cut_otherwise_have_no_interval(llama: Path, letters: Path) -> None:
    models = [llama, {"model": str(letters), "name": "letters"}]
    results = run(recipe(models, data={"eval": "texts", "packing": True, "max_length": 16})).results
    assert results["differences"]["letters"]["texts"] == {}
    assert results["notes"][0].endswith("the rows are cut otherwise, so there is no interval of the difference")
    cut = run(recipe(models, data={"eval": "texts", "max_length": 10})).results
    assert cut["notes"][0].endswith("rows are cut to max_length at other places, so its scores are of other text")


def rows_of(tokens: list[int], targets: list[bool]) -> Rows:
    import numpy as np

    return Rows([Encoded(np.array(tokens, np.int32), np.array(targets))], task="causal_lm")


@pytest.mark.parametrize("text", ["plain words", "  blanks  and\n\ttabs ", "Grüße, 世界 🙂!", "a"])
def test_bytes_of_all_targets_are_those_of_the_text(text: str) -> None:
    tokenizer = byte_level()
    tokens = tokenizer("x")["input_ids"] + tokenizer(text, add_special_tokens=False)["input_ids"]
    ended = [*tokens, tokenizer.eos_token_id]
    (found,) = target_bytes(rows_of(ended, [False] + [True] * (len(ended) - 1)), tokenizer)
    assert found == len(text.encode())


def test_bytes_of_several_runs_of_targets() -> None:
    tokenizer = byte_level()
    parts = ["ask: ", "täglich", " and ", "later"]
    encoded = [tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts]
    marks = [learned for part, learned in zip(encoded, (False, True, False, True), strict=True) for _ in part]
    (found,) = target_bytes(rows_of([token for part in encoded for token in part], marks), tokenizer)
    assert found == len("täglich".encode()) + len("later")


def test_cutting_a_character_in_two_counts_it_once() -> None:
    tokenizer = byte_level()
    tokens = tokenizer("a🙂b", add_special_tokens=False)["input_ids"]
    counts = []
    for cut in range(1, len(tokens)):
        marks = [False] * cut + [True] * (len(tokens) - cut)
        rest = [False] + [True] * (cut - 1) + [False] * (len(tokens) - cut)
        counts.append(sum(target_bytes(rows_of(tokens, each), tokenizer)[0] for each in (marks, rest)))
    assert set(counts) == {len("🙂b".encode())}


def test_identity_of_tokenizers(llama: Path, letters: Path) -> None:
    same = [transformers.AutoTokenizer.from_pretrained(llama) for _ in range(2)]
    assert tokenizer_identity(same[0]) == tokenizer_identity(same[1])
    other = transformers.AutoTokenizer.from_pretrained(letters)
    assert tokenizer_identity(same[0]) != tokenizer_identity(other)
    same[1].chat_template = "{{ messages }}"
    assert tokenizer_identity(same[0]) != tokenizer_identity(same[1])
