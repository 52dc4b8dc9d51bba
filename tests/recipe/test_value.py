"""Scalars, gradients and filters: the numbers that mergekit 0.1.5 gives, derived here a second time."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import PydanticCustomError

from mergekit_bayes.recipe import field
from mergekit_bayes.recipe.value import (
    Condition,
    Filtered,
    Gradient,
    decides_for_all,
    explain_unused,
    layer_positions,
    parse_value,
    plain_value,
    unused_filters,
    value_at,
)

NAMES = (
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.1.mlp.up_proj.weight",
    "lm_head.weight",
)

finite = st.floats(-1e6, 1e6)


def number(raw: object) -> object:
    return parse_value(raw, field.number)


@pytest.mark.parametrize(
    ("anchors", "t", "expected"),
    [
        ([0.3], 0.0, 0.3),
        ([0.3], 1.0, 0.3),
        ([0, 1], 0.0, 0.0),
        ([0, 1], 0.25, 0.25),
        ([0, 1], 1.0, 1.0),
        ([0, 0.5, 1], 0.5, 0.5),
        ([1, 0, 1], 0.25, 0.5),
        ([1, 0, 1], 0.75, 0.5),
        ([0.2, 1.0, 0.4, 0.0], 1 / 3, 1.0),
        ([-1, 3], 0.5, 1.0),
    ],
)
def test_numbers_are_interpolated_between_equally_spaced_anchors(
    anchors: list[float], t: float, expected: float
) -> None:
    assert value_at(Gradient(tuple(anchors)), "x", t) == pytest.approx(expected, abs=1e-15)


@given(st.lists(finite, min_size=1, max_size=9), st.integers(0, 40), st.integers(1, 40))
def test_interpolation_is_the_broken_line_through_the_anchors(anchors: list[float], i: int, last: int) -> None:
    t = Fraction(min(i, last), last)
    scaled = t * (len(anchors) - 1)
    left = min(int(scaled), len(anchors) - 1)
    right = min(left + 1, len(anchors) - 1)
    exact = Fraction(anchors[left]) + (scaled - left) * (Fraction(anchors[right]) - Fraction(anchors[left]))
    found = value_at(Gradient(tuple(anchors)), "x", float(t))
    assert isinstance(found, float)
    # t itself is rounded, so an anchor may be missed by a rounding step of t times the steepest slope
    tolerance = 1e-13 * (max(map(abs, anchors)) + 1) * len(anchors)
    assert abs(Fraction(found) - exact) <= Fraction(tolerance)


@given(st.lists(finite, min_size=1, max_size=9), st.floats(0, 1))
def test_interpolation_stays_between_its_anchors(anchors: list[float], t: float) -> None:
    found = value_at(Gradient(tuple(anchors)), "x", t)
    assert isinstance(found, float)
    margin = 1e-12 * max(1.0, *map(abs, anchors))
    assert min(anchors) - margin <= found <= max(anchors) + margin


@pytest.mark.parametrize(("t", "expected"), [(0.0, True), (0.49, True), (0.5, False), (0.99, False), (1.0, True)])
def test_booleans_hold_until_the_next_anchor(t: float, expected: bool) -> None:
    assert value_at(Gradient((True, False, True)), "x", t) is expected


def test_text_holds_until_the_next_anchor() -> None:
    assert [value_at(Gradient(("a", "b")), "x", t) for t in (0.0, 0.9, 1.0)] == ["a", "a", "b"]


def test_the_first_filter_that_matches_decides() -> None:
    value = number(
        [
            {"filter": "mlp.up", "value": 1},
            {"filter": "mlp", "value": 2},
            {"filter": "q_proj", "value": [3, 5]},
            {"value": 9},
        ]
    )
    found = [value_at(value, name, t) for name, t in layer_positions(NAMES).items()]  # type: ignore[arg-type]
    assert found == [9, 3.0, 1, 5.0, 1, 9]


def test_a_tensor_that_no_filter_matches_has_no_value() -> None:
    assert value_at(Filtered((Condition(1.0, "mlp"),)), "lm_head.weight", 0.0) is None


@pytest.mark.parametrize("everything", [None, "*", ""])
def test_filters_that_match_everything(everything: str | None) -> None:
    value = Filtered((Condition(1.0, everything),))
    assert value_at(value, "lm_head.weight", 0.0) == 1.0
    assert decides_for_all(value)
    assert unused_filters(value, NAMES) == ()


def test_a_filter_is_a_substring_and_no_pattern() -> None:
    assert not Condition(1.0, "layers.*.mlp").matches("model.layers.0.mlp.up_proj.weight")
    assert not Condition(1.0, "layers.1").matches("model.layers_1.mlp")


def test_a_single_filter_may_be_written_without_a_list() -> None:
    assert number({"filter": "mlp", "value": 2}) == Filtered((Condition(2, "mlp"),))


def test_filters_that_decide_for_no_tensor_are_found() -> None:
    value = number(
        [
            {"filter": "mlp", "value": 1},
            {"filter": "up_proj", "value": 2},
            {"filter": "vision", "value": 3},
            {"filter": "layers.*", "value": 3},
            {"filter": "*", "value": 4},
        ]
    )
    assert unused_filters(value, NAMES) == ("up_proj", "vision", "layers.*")  # type: ignore[arg-type]
    reasons = dict(explain_unused(value, NAMES))  # type: ignore[arg-type]
    assert reasons == {
        1: '"up_proj" decides for no tensor: earlier filters match all that it matches. Put it first.',
        2: '"vision" matches no tensor name.',
        3: '"layers.*" matches no tensor name. A filter is a plain part of the name, not a pattern.',
    }


@pytest.mark.parametrize("value", [0.5, Gradient((1.0, 2.0))])
def test_values_without_filters_have_no_unused_ones(value: float | Gradient) -> None:
    assert unused_filters(value, ()) == ()


conditions = st.builds(
    Condition,
    finite | st.builds(Gradient, st.lists(finite, min_size=1, max_size=3).map(tuple)),
    st.sampled_from(["a", "b", "ab", "c"]),
)


@given(
    st.lists(conditions, min_size=1, max_size=5).map(lambda found: Filtered(tuple(found))),
    st.lists(st.text("abx", max_size=4), max_size=6),
)
def test_a_filter_is_unused_if_and_only_if_changing_its_value_changes_nothing(
    value: Filtered, names: list[str]
) -> None:
    unused = {index for index, _ in explain_unused(value, names)}
    for index, condition in enumerate(value.conditions):
        changed = list(value.conditions)
        changed[index] = Condition("changed", condition.filter)
        same = all(value_at(Filtered(tuple(changed)), name, 0.5) != "changed" for name in names)
        assert same == (index in unused)


@given(
    st.one_of(
        finite,
        st.lists(finite, min_size=1, max_size=4),
        st.lists(
            st.fixed_dictionaries(
                {"value": finite | st.lists(finite, min_size=1)}, optional={"filter": st.text(min_size=1)}
            ),
            min_size=1,
            max_size=1,
        ),
    )
)
def test_a_value_is_read_back_from_its_plain_form(raw: object) -> None:
    value = parse_value(raw, field.number)
    assert parse_value(plain_value(value), field.number) == value


def test_every_fault_in_a_value_is_reported() -> None:
    raw = [{"filter": 1, "value": [True, "x"]}, 3, {"value": {"value": 1}}, {"filter": "a", "valu": 1}]
    with pytest.raises(PydanticCustomError) as caught:
        number(raw)
    places = [problem.path for problem in (caught.value.context or {})["problems"]]
    assert places == [
        (0, "filter"),
        (0, "value", 0),
        (0, "value", 1),
        (1,),
        (2, "value"),
        (3, "valu"),
        (3, "value"),
        (3,),
    ]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([], {}),
        (["a.0.w"], {"a.0.w": 1.0}),
        (["a.0.w", "a.1.w", "a.2.w"], {"a.0.w": 0.0, "a.1.w": 0.5, "a.2.w": 1.0}),
        (["a.w", "a.0.w", "a.4.w"], {"a.w": 0.0, "a.0.w": 0.0, "a.4.w": 1.0}),
        (["0.w", "1.w"], {"0.w": 0.0, "1.w": 1.0}),
        (["h.1.moe.experts.7.w", "h.0.moe.experts.0.w"], {"h.1.moe.experts.7.w": 1.0, "h.0.moe.experts.0.w": 0.0}),
        (["enc.0.w", "enc.1.w", "dec.0.w"], {"enc.0.w": 0.0, "enc.1.w": 1.0, "dec.0.w": 1.0}),
        (["a.1x.w", "a.12"], {"a.1x.w": 0.0, "a.12": 0.0}),
        (["a.10.w", "a.2.w", "a.00.w"], {"a.10.w": 1.0, "a.2.w": 0.2, "a.00.w": 0.0}),
    ],
)
def test_layer_positions(names: list[str], expected: dict[str, float]) -> None:
    assert layer_positions(names) == expected


@given(st.lists(st.text("ab.01", max_size=8)))
def test_layer_positions_lie_between_first_and_last(names: list[str]) -> None:
    found = layer_positions(names)
    assert list(found) == list(dict.fromkeys(names))
    assert all(0 <= t <= 1 for t in found.values())
