"""The value of a parameter: a scalar, a gradient over the layers, or a list of filters (mergekit's grammar).

    weight: 0.5                                             the same for every tensor
    weight: [0, 0.5, 1]                                     interpolated from the first layer to the last
    weight: [{filter: mlp, value: 0.3}, {value: [0, 1]}]    the first filter found in the name decides

A layer's position t runs from 0 (first) to 1 (last); tensors outside the layers have t = 0. Numbers are
interpolated linearly between equally spaced anchors; booleans and text step, each holding until the next
anchor. A filter is a plain substring of the tensor's name, `*` (or none) matches every tensor, and a tensor
that no filter matches takes its value from the next more general place, as if this one were not there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from mergekit_bayes.recipe.problem import Problem, Refusal, did_you_mean, problems_of, refusal, show
from mergekit_bayes.recipe.scalar import Scalar


@dataclass(frozen=True)
class Gradient:
    """Values at equally spaced positions from the first layer to the last; at least one."""

    anchors: tuple[Scalar, ...]


@dataclass(frozen=True)
class Condition:
    """A value for the tensors whose name contains `filter`; None or `*` for all of them."""

    value: Scalar | Gradient
    filter: str | None = None

    def matches(self, tensor_name: str) -> bool:
        """Whether this condition decides for a tensor that no earlier one decided for."""
        return self.filter is None or self.filter == "*" or self.filter in tensor_name


@dataclass(frozen=True)
class Filtered:
    """Conditions in the order in which they are tried."""

    conditions: tuple[Condition, ...]


Value: TypeAlias = Scalar | Gradient | Filtered

_ALL = (None, "*", "")


def parse_value(raw: object, check: Callable[[object], Scalar]) -> Value:
    """Read a value from plain data.

    Args:
        raw: what the recipe says.
        check: refuses (Refusal) a scalar of the wrong type or range, else returns it.

    Raises:
        Refusal: every fault, each with its place below the value.
    """
    if isinstance(raw, Mapping):
        return Filtered((_condition(raw, check),))
    if not isinstance(raw, list | tuple):
        return check(raw)
    if not any(isinstance(entry, Mapping) for entry in raw):
        return _gradient(raw, check)
    conditions: list[Condition] = []
    problems: list[Problem] = []
    for index, entry in enumerate(raw):
        try:
            conditions.append(_condition(entry, check))
        except Refusal as error:
            problems += problems_of(error, index)
    problems += _unreachable(raw)
    if problems:
        raise refusal(*problems)
    return Filtered(tuple(conditions))


def plain_value(value: Value) -> object:
    """The plain data that `parse_value` reads back to the same value."""
    match value:
        case Gradient(anchors):
            return list(anchors)
        case Filtered(conditions):
            return [
                ({} if c.filter is None else {"filter": c.filter}) | {"value": plain_value(c.value)} for c in conditions
            ]
        case _:
            return value


def value_at(value: Value, tensor_name: str, t: float) -> Scalar | None:
    """The value for one tensor; None when no filter matches it.

    Args:
        value: the parameter's value.
        tensor_name: the tensor's full name in the checkpoint.
        t: position of its layer, 0 to 1.
    """
    match value:
        case Gradient(anchors):
            return _interpolate(anchors, t)
        case Filtered(conditions):
            chosen = next((c.value for c in conditions if c.matches(tensor_name)), None)
            return None if chosen is None else value_at(chosen, tensor_name, t)
        case _:
            return value


def scalars_of(value: Value) -> tuple[Scalar, ...]:
    """Every scalar written in a value."""
    match value:
        case Gradient(anchors):
            return anchors
        case Filtered(conditions):
            return tuple(scalar for c in conditions for scalar in scalars_of(c.value))
        case _:
            return (value,)


def decides_for_all(value: Value) -> bool:
    """Whether every tensor gets a value: there are no filters, or one of them matches every name."""
    return not isinstance(value, Filtered) or any(c.filter in _ALL for c in value.conditions)


def unused_filters(value: Value, names: Iterable[str]) -> tuple[str, ...]:
    """The filters that decide for no tensor, because none has such a name or earlier filters take them all.

    Args:
        value: the parameter's value.
        names: the tensors it could decide for.
    """
    if not isinstance(value, Filtered):
        return ()
    return tuple(value.conditions[index].filter or "" for index, _ in explain_unused(value, names))


def explain_unused(value: Value, names: Iterable[str]) -> tuple[tuple[int, str], ...]:
    """The filters that decide for no tensor: (index in the list, why), as `unused_filters`."""
    if not isinstance(value, Filtered):
        return ()
    everything, open_names = list(names), list(names)
    unused: list[tuple[int, str]] = []
    for index, condition in enumerate(value.conditions):
        name = condition.filter
        if name not in (None, "*") and not any(map(condition.matches, open_names)):
            unused.append((index, _why_unused(name, taken=any(map(condition.matches, everything)))))
        open_names = [name for name in open_names if not condition.matches(name)]
    return tuple(unused)


def layer_positions(names: Iterable[str]) -> dict[str, float]:
    """The position t of every tensor's layer, from the first number between dots in its name.

    Layer i of L has t = i / (L - 1), a single layer has t = 1, a tensor outside the layers has t = 0. Layers
    are counted for each prefix apart, so that encoder and decoder of one checkpoint each run from 0 to 1.
    """
    ordered = list(names)
    layers = {name: _layer_of(name) for name in ordered}
    last: dict[str, int] = {}
    for found in layers.values():
        if found is not None:
            last[found[0]] = max(last.get(found[0], 0), found[1])
    return {name: 0.0 if found is None else _position(found[1], last[found[0]]) for name, found in layers.items()}


_LAYER = re.compile(r"(?:^|\.)([0-9]{1,9})\.")


def _layer_of(name: str) -> tuple[str, int] | None:
    found = _LAYER.search(name)
    return (name[: found.start()], int(found[1])) if found else None


def _position(index: int, last: int) -> float:
    return index / last if last else 1.0


def _interpolate(anchors: tuple[Scalar, ...], t: float) -> Scalar:
    scaled = t * (len(anchors) - 1)
    i = int(scaled)
    left, right = anchors[i], anchors[min(len(anchors) - 1, i + 1)]
    if isinstance(left, bool | str) or isinstance(right, bool | str):
        return left
    return (1 - (scaled - i)) * left + (scaled - i) * right


def _gradient(raw: Sequence[object], check: Callable[[object], Scalar]) -> Gradient:
    if not raw:
        raise refusal("an empty list has no value for any layer.")
    anchors: list[Scalar] = []
    problems: list[Problem] = []
    for index, entry in enumerate(raw):
        try:
            anchors.append(check(entry))
        except Refusal as error:
            problems += problems_of(error, index)
    if problems:
        raise refusal(*problems)
    return Gradient(tuple(anchors))


def _condition(raw: object, check: Callable[[object], Scalar]) -> Condition:
    if not isinstance(raw, Mapping):
        raise refusal(f"found {show(raw)} among filters; each entry is `{{filter: ..., value: ...}}`.")
    problems = [
        Problem((str(key),), f"unknown key.{did_you_mean(str(key), ('filter', 'value'))}", at_key=True)
        for key in raw
        if key not in ("filter", "value")
    ]
    chosen, value = raw.get("filter"), None
    if chosen is not None and not isinstance(chosen, str):
        problems.append(Problem(("filter",), f"expected part of a tensor's name, found {show(chosen)}."))
    if "value" not in raw:
        problems.append(Problem(("value",), "missing; a filter needs the value it sets."))
    else:
        try:
            value = _conditional_value(raw["value"], check)
        except Refusal as error:
            problems += problems_of(error, "value")
    if problems or value is None:
        raise refusal(*problems)
    return Condition(value, chosen if isinstance(chosen, str) else None)


def _conditional_value(raw: object, check: Callable[[object], Scalar]) -> Scalar | Gradient:
    if isinstance(raw, Mapping) or (isinstance(raw, list | tuple) and any(isinstance(e, Mapping) for e in raw)):
        raise refusal("a filter inside a filter; write all filters in one list, the narrowest first.")
    return _gradient(raw, check) if isinstance(raw, list | tuple) else check(raw)


def _unreachable(raw: Sequence[object]) -> list[Problem]:
    problems: list[Problem] = []
    catch_all: int | None = None
    for index, entry in enumerate(raw):
        if catch_all is not None:
            problems.append(Problem((index,), f"never reached: entry [{catch_all}] already matches every tensor."))
        elif isinstance(entry, Mapping) and entry.keys() <= {"filter", "value"} and entry.get("filter") in _ALL:
            catch_all = index
    return problems


def _why_unused(name: str, *, taken: bool) -> str:
    if taken:
        return f"{show(name)} decides for no tensor: earlier filters match all that it matches. Put it first."
    pattern = any(c in name for c in "*?^$[]\\")
    hint = " A filter is a plain part of the name, not a pattern." if pattern else ""
    return f"{show(name)} matches no tensor name.{hint}"
