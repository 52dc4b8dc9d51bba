"""Parameters of merge methods accept what they declare and name what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_bayes.errors import MethodError
from mergekit_bayes.merge.parameter import Parameter, resolve_parameters

DECLARED = (
    Parameter("normalize", bool, True),
    Parameter("scale", float, 1.0, minimum=0.0, maximum=2.0),
    Parameter("steps", int, 3, minimum=1),
    Parameter("mode", str, "fast"),
    Parameter("density", float, 1.0, only=1.0, per_source=True),
)


@pytest.mark.parametrize(
    ("name", "given", "taken"),
    [
        ("normalize", False, False),
        ("normalize", 1, True),
        ("normalize", 0.0, False),
        ("scale", 2, 2.0),
        ("scale", 0.5, 0.5),
        ("steps", 7, 7),
        ("mode", "slow", "slow"),
        ("density", 1, 1.0),
    ],
)
def test_legal_values_arrive_in_the_declared_type(name: str, given: Any, taken: Any) -> None:
    value = resolve_parameters("method", DECLARED, {name: given})[name]
    assert value == taken
    assert type(value) is type(taken)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("normalize", 2, "is 2; it must be true or false"),
        ("normalize", "yes", "is 'yes'; it must be true or false"),
        ("normalize", None, "is None; it must be true or false"),
        ("scale", True, "is true; it must be a number"),
        ("scale", "1", "is '1'; it must be a number"),
        ("scale", float("nan"), "is nan; it must be a number"),
        ("scale", float("inf"), "is inf; it must be a number"),
        ("scale", [1.0], r"is \[1.0\]; it must be a number"),
        ("scale", -0.5, "is -0.5; it must be at least 0.0"),
        ("scale", 2.5, "is 2.5; it must be at most 2.0"),
        ("steps", 1.0, "is 1.0; it must be a whole number"),
        ("steps", True, "is true; it must be a whole number"),
        ("steps", 0, "is 0; it must be at least 1"),
        ("mode", 1, "is 1; it must be a text"),
        ("density", 0.5, "is 0.5; only 1.0 is supported here"),
    ],
)
def test_illegal_values_are_refused_with_name_value_and_expectation(name: str, given: Any, message: str) -> None:
    with pytest.raises(MethodError, match=rf"^merge method `m`: parameter `{name}` {message}$"):
        resolve_parameters("merge method `m`", DECLARED, {name: given})


def test_all_parameters_come_back_in_declaration_order() -> None:
    resolved = resolve_parameters("method", DECLARED, {"mode": "slow", "normalize": False})
    assert list(resolved.items()) == [
        ("normalize", False),
        ("scale", 1.0),
        ("steps", 3),
        ("mode", "slow"),
        ("density", 1.0),
    ]


def test_an_unknown_name_gets_the_nearest_or_the_list() -> None:
    with pytest.raises(MethodError, match=r"method has no parameter `normalise`; .* Did you mean `normalize`\?"):
        resolve_parameters("method", DECLARED, {"normalise": True})
    with pytest.raises(MethodError, match=r"it has `normalize`, `scale`, `steps`, `mode`, `density`\.$"):
        resolve_parameters("method", DECLARED, {"xyzzy": True})
    with pytest.raises(MethodError, match=r"it has none besides `weight`\.$"):
        resolve_parameters("method", (), {"xyzzy": True})


def test_a_declaration_is_checked_when_it_is_made() -> None:
    with pytest.raises(MethodError, match="is none of bool, int, float, str"):
        Parameter("names", list, "a")  # type: ignore[arg-type]
    with pytest.raises(MethodError, match=r"`scale` is -1.0; it must be at least 0"):
        Parameter("scale", float, -1.0, minimum=0)
