"""Reading YAML: what it means, where it stands, and everything that is refused before it can do harm."""

from __future__ import annotations

import json
import os
import re
import resource
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_bayes.errors import RecipeError
from mergekit_bayes.recipe.document import MAX_BYTES, MAX_DEPTH, parse_document, read_document
from mergekit_bayes.recipe.problem import Location

PLACED = re.compile(r"r\.yaml:[1-9]\d*:[1-9]\d*  \S")


def problems_of(text: str) -> tuple[str, ...] | None:
    """What a text is refused with; None for one that is read."""
    try:
        assert isinstance(parse_document(text, "r.yaml").data, dict)
    except RecipeError as error:
        return error.problems
    return None


def refusal_of(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_document(text, "r.yaml")
    return str(caught.value)


def test_locations_of_keys_and_values() -> None:
    document = parse_document("a: 1\nb:\n  - x\n  - {c: [2, 3], 'd e': }\n", "r.yaml")
    assert document.data == {"a": 1, "b": ["x", {"c": [2, 3], "d e": None}]}
    assert document.locations == {
        (): Location(1, 1),
        ("a",): Location(1, 4),
        ("b",): Location(3, 3),
        ("b", 0): Location(3, 5),
        ("b", 1): Location(4, 5),
        ("b", 1, "c"): Location(4, 9),
        ("b", 1, "c", 0): Location(4, 10),
        ("b", 1, "c", 1): Location(4, 13),
        ("b", 1, "d e"): Location(4, 17),  # a value that is not written stands at its key
    }
    assert document.places.keys[("b", 1, "c")] == Location(4, 6)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_locations_do_not_depend_on_line_ends(newline: str) -> None:
    document = parse_document(newline.join(["# first", "a: 1", "  ", "ü: {b: 2}"]), "r.yaml")
    assert document.locations[("ü", "b")] == Location(4, 8)


def test_quoted_scalars_are_text() -> None:
    text = "a: '1'\nb: \"true\"\nc: |\n  2\nd: >-\n  null\ne: 1\n"
    assert parse_document(text, "r").data == {"a": "1", "b": "true", "c": "2\n", "d": "null", "e": 1}


def test_keys_are_text_whatever_they_look_like() -> None:
    assert parse_document("1: a\ntrue: b\nnull: c\n", "r").data == {"1": "a", "true": "b", "null": "c"}


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=40)
@given(st.dictionaries(st.text(min_size=1, max_size=8), json_values, max_size=5))
def test_json_is_read_as_json(data: dict[str, object]) -> None:
    text = json.dumps(data)
    # "\ud83d\ude00" is one character to JSON and two halves of one to YAML
    if re.search(r"\\ud[89ab]", text, re.IGNORECASE):
        return
    assert parse_document(text, "r").data == data


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    problems = problems_of(text)
    assert problems is None or (problems and all(PLACED.match(line) for line in problems))


@given(st.text(alphabet="[]{}:,-?&*!|>'\"%@`#\\ \n\tab<~1.", max_size=40))
def test_any_punctuation_is_read_or_refused(text: str) -> None:
    problems = problems_of(text)
    assert problems is None or (problems and all(PLACED.match(line) for line in problems))


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(raw)
    with suppress(RecipeError):
        assert isinstance(read_document(path).data, dict)


DEEP = {
    "lists": "[" * 10_000,
    "closed lists": "a: " + "[" * 10_000 + "]" * 10_000,
    "mappings": "a: " + "{a: " * 10_000,
    "dashes": "- " * 10_000,
    "indentation": "\n".join(" " * depth + "a:" for depth in range(650)),
    "question marks": "? " * 10_000,
    "alternating": "a: " + "[{a: " * 5_000,
}


@pytest.mark.parametrize("shape", DEEP)
def test_deep_nesting_is_refused_at_once(shape: str) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    message = refusal_of(DEEP[shape])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 5
    assert re.fullmatch(rf"r\.yaml:\d+:\d+  nested more than {MAX_DEPTH} deep\.|.*a key is a plain word.*", message)


def test_nesting_up_to_the_limit_is_read() -> None:
    assert parse_document("a: " + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1), "r").data
    assert "nested" in refusal_of("a: " + "[" * MAX_DEPTH + "]" * MAX_DEPTH)


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "large.yaml"
    path.write_bytes(b"a: [" + b"x, " * (10 * 2**20 // 3) + b"x]")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    with pytest.raises(RecipeError, match=r"large\.yaml: larger than 256 KiB"):
        read_document(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_utime - before < 1


def test_a_file_at_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "just.yaml"
    path.write_text("a: " + "x" * (MAX_BYTES - 3))
    assert len(read_document(path).data["a"]) == MAX_BYTES - 3  # type: ignore[arg-type]
    path.write_text("a: " + "x" * (MAX_BYTES - 2))
    with pytest.raises(RecipeError, match="larger"):
        read_document(path)


def test_an_endless_file_is_refused() -> None:
    with pytest.raises(RecipeError, match="/dev/zero: larger than"):
        read_document("/dev/zero")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"a: 1\nb: \xff\n", "r.yaml:2:4  byte 0xff is not UTF-8 text"),
        ("a: ü".encode("latin-1"), "r.yaml:1:4  byte 0xfc is not UTF-8 text"),
        ("a: 1".encode("utf-16"), "r.yaml:1:1  byte 0xff is not UTF-8 text"),
        (b"PK\x03\x04", "r.yaml:1:3  character U+0003 has no place in a text file"),
        (b"a: 1\nb: x\0y\n", "r.yaml:2:5  character U+0000 has no place in a text file"),
        ("a: \x85\x7f".encode(), "r.yaml:1:5  character U+007F has no place in a text file"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw: bytes, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_bytes(raw)
    with pytest.raises(RecipeError) as caught:
        read_document("r.yaml")
    assert message in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: 1", encoding="utf-8-sig")
    assert read_document(path).data == {"a": 1}


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.yaml", "No such file"), (".", "Is a directory"), ("none/r.yaml", "No such file"), ("a\0b", "null")],
)
def test_what_cannot_be_opened_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match=message):
        read_document(name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("a: 1")
    path.chmod(0)
    with pytest.raises(RecipeError, match="Permission denied"):
        read_document(path)


def test_nothing_is_constructed_from_a_tag() -> None:
    message = refusal_of("a: !!python/object/apply:os.system [touch /tmp/never]\nb: !x 1\nc: ! y\n")
    assert message.count("recipes are plain data without tags") == 3


def test_billion_laughs_are_refused_at_the_first_anchor() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 30)]
    assert "1:5  anchor `&a0`" in refusal_of("\n".join(lines))


def test_all_faults_that_do_not_stop_the_reading_are_reported_in_order() -> None:
    message = refusal_of("a: &x 1\nb: !y 2\na: *x\nc: {d: 1, d: 2}\n")
    assert [line.split("  ")[0] for line in message.splitlines()] == [
        "r.yaml:1:4",
        "r.yaml:2:4",
        "r.yaml:3:1",
        "r.yaml:3:4",
        "r.yaml:4:11",
    ]
