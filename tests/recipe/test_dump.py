"""Plain data to YAML: every scalar is read back as what it is."""

from __future__ import annotations

import pytest
from ruamel.yaml import YAML

from mergekit_bayes.recipe import dump_yaml, parse_document

TEXTS = [
    "", " ", "a", "a b", "models/code", "org/base@v2+org/adapter", "~/models", "../x", "~", "null", "true", "NO", "no",
    "1", "1e-4", ".5", ".inf", "0x1F", "0o17", "1_000", "012", "2024-01-01", "12:30", "=", "<<", "?", "-", "- a", "*a",
    "&a", "!a", "%a", "@a", "`a`", "#a", "a #b", "a: b", "a:", "{a}", "[a]", "a,b", "'a'", '"a"', "\\a", "|", ">", "ü",
    "模型/代码", "😀", "a\u2028b", "x" * 400, "9" * 250, "word " * 60, " lead", "trail ",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("shape", ["value", "list", "mapping in list", "key"])
def test_text_stays_text(text: str, shape: str) -> None:
    shapes: dict[str, dict[str, object]] = {
        "value": {"k": text},
        "list": {"k": [text, 1]},
        "mapping in list": {"k": [{"filter": text, "value": [1, 2]}, {"value": text}]},
        "key": {text or "k": 1},
    }
    dumped = dump_yaml(shapes[shape])
    assert parse_document(dumped, "r").data == shapes[shape]
    assert YAML(typ="safe", pure=True).load(dumped) == shapes[shape]


@pytest.mark.parametrize("value", [0, -1, 2**63, True, False, None, 0.1, 1e-7, 1e22, -0.0, 5e-324, 1.79e308])
def test_other_scalars_stay_what_they_are(value: object) -> None:
    (found,) = parse_document(dump_yaml({"k": value}), "r").data.values()
    assert found == value
    assert type(found) is type(value)


def test_keys_keep_their_order() -> None:
    assert dump_yaml({"b": 1, "a": [1, 2], "c": {"z": 1, "y": 2}}) == "b: 1\na: [1, 2]\nc: {z: 1, y: 2}\n"
