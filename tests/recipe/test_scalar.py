"""Plain scalars, against the table of YAML 1.2's core schema."""

from __future__ import annotations

import math

import pytest
from pydantic_core import PydanticCustomError

from mergekit_bayes.recipe.scalar import resolve_scalar


@pytest.mark.parametrize("text", ["", "~", "null", "Null", "NULL"])
def test_nothing(text: str) -> None:
    assert resolve_scalar(text) is None


@pytest.mark.parametrize(("text", "value"), [("true", True), ("TRUE", True), ("False", False), ("false", False)])
def test_booleans(text: str, value: bool) -> None:
    assert resolve_scalar(text) is value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-3", -3),
        ("+7", 7),
        ("012", 12),  # octal in YAML 1.1
        ("0x1F", 31),
        ("0o17", 15),
        ("1e-4", 1e-4),  # text in YAML 1.1
        ("1.", 1.0),
        (".5", 0.5),
        ("-2.5E+3", -2500.0),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("1e999", math.inf),
    ],
)
def test_numbers(text: str, value: float) -> None:
    found = resolve_scalar(text)
    assert found == value
    assert type(found) is type(value)


def test_not_a_number() -> None:
    found = resolve_scalar(".nan")
    assert isinstance(found, float)
    assert math.isnan(found)


@pytest.mark.parametrize(
    "text",
    [
        "yes",
        "no",
        "on",
        "off",
        "y",
        "tRUE",
        "nUll",
        "12:30",
        "2024-01-01",
        "1_000",
        "0b1",
        "-",
        ".",
        "e5",
        "1e",
        "0x",
        "٣",
        "1 ",
    ],
)
def test_everything_else_is_text(text: str) -> None:
    assert resolve_scalar(text) == text


def test_numbers_of_too_many_digits_are_refused() -> None:
    with pytest.raises(PydanticCustomError, match="5000 digits"):
        resolve_scalar("9" * 5000)
