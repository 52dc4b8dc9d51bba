"""The split of the example's text: nothing held out may be seen in training."""

from __future__ import annotations

import pytest

DOMAINS = ("code", "docs", "headers")


def _paragraphs(text: str) -> set[str]:
    return {" ".join(part.split()) for part in text.split("\n\n")}


def test_removes_long_paragraphs_wherever_they_recur(example):
    from corpus import without_paragraphs_of

    long = "a paragraph of more than sixty characters, which occurs in two topics at once"
    kept = without_paragraphs_of(
        [f"intro\n\n{long}"],
        {"one": f"before\n\n  {long.replace(' ', chr(10), 1)}\n\nafter", "two": long, "three": "intro"},
    )
    assert kept == {"one": "before\n\nafter", "three": "intro"}


@pytest.fixture(scope="module")
def splits(example):
    """Every domain's split, and the paragraphs of all text that any model was trained on."""
    from corpus import DOMAINS as ALL
    from corpus import read_other_code, split_domain, without_paragraphs_of

    found = {name: split_domain(name) for name in ALL}
    held_out = [text for split in found.values() for text in split.held_out.values()]
    training = [text for split in found.values() for text in split.train.values()]
    training += without_paragraphs_of(held_out, read_other_code()).values()
    return found, set().union(*map(_paragraphs, training))


@pytest.mark.slow
@pytest.mark.parametrize("domain", DOMAINS)
def test_held_out_text_is_not_in_any_training_text(example, splits, domain):
    from corpus import join

    found, seen = splits
    committed = (example / "held_out" / f"{domain}.txt").read_text(encoding="utf-8")
    if join(found[domain].held_out) != committed:
        pytest.skip("this Python's standard library is not the one the artefacts were made from")
    long = {paragraph for paragraph in _paragraphs(committed.replace("<|endoftext|>", "\n\n")) if len(paragraph) >= 60}
    assert len(long) > 50
    assert not long & seen
    assert not found[domain].train.keys() & found[domain].held_out.keys()


def test_split_is_deterministic(example):
    from corpus import split_domain

    assert split_domain("docs") == split_domain("docs")


def test_every_domain_has_held_out_text_of_comparable_size(example):
    sizes = [(example / "held_out" / f"{domain}.txt").stat().st_size for domain in DOMAINS]
    assert all(80_000 <= size <= 200_000 for size in sizes), sizes
