"""Single values of a recipe: each function returns the value or says in plain words what is wrong with it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, TypeVar

from mergekit_bayes.recipe.mergekit_words import DTYPES as SHORT_DTYPES
from mergekit_bayes.recipe.mergekit_words import FALSE_WORDS, TRUE_WORDS
from mergekit_bayes.recipe.method_schema import ParameterSchema
from mergekit_bayes.recipe.problem import Problem, Refusal, did_you_mean, one_of, problems_of, refusal, show
from mergekit_bayes.recipe.scalar import Scalar, resolve_scalar
from mergekit_bayes.recipe.spec import Entries

T = TypeVar("T")
K = TypeVar("K", str, int)

DTYPES = ("bfloat16", "float16", "float32", "float64")
"""The dtypes a recipe may name."""

_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kKmMgGtT]i?)?[bB]?\s*")
_UNITS = {"": 1} | {
    prefix + i: base**power for power, prefix in enumerate("kmgt", start=1) for i, base in (("", 1000), ("i", 1024))
}


def text(value: object) -> str:
    """Text of at least one character, without control characters; a `pathlib.Path` is taken as its text."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        hint = " Put it in quotes if it is a name." if isinstance(value, int | float) else ""
        raise refusal(f"expected text, found {show(value)}.{hint}")
    if not value.strip():
        raise refusal("expected text, found nothing but blanks.")
    if any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in value):
        raise refusal(f"{show(value)} contains a control character.")
    return value


def number(value: object) -> float:
    """A finite number; neither a boolean nor a number in quotes."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refusal(f"expected a number, found {show(value)}.{_unquote(value)}")
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise refusal(f"expected a finite number, found {show(value)}.")
    return value


def positive(value: object) -> float:
    """A finite number above zero."""
    if number(value) <= 0:
        raise refusal(f"expected a number above zero, found {show(value)}.")
    return number(value)


def between(
    low: float, high: float = math.inf, *, above: bool = False, below: bool = False
) -> Callable[[object], float]:
    """A finite number from `low` to `high`, both included; `above` and `below` exclude them."""

    def check(value: object) -> float:
        found = number(value)
        if found < low or found > high or (above and found == low) or (below and found == high):
            bounds = [f"{'above' if above else 'of at least'} {low:g}"]
            bounds += [f"{'below' if below else 'at most'} {high:g}"] if math.isfinite(high) else []
            raise refusal(f"expected a number {' and '.join(bounds)}, found {show(value)}.")
        return found

    return check


def integer(minimum: int, maximum: int = 2**63 - 1) -> Callable[[object], int]:
    """A whole number between two bounds."""

    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise refusal(f"expected a whole number, found {show(value)}.{_unquote(value)}")
        if not minimum <= value <= maximum:
            bound = f"of at least {minimum}" if value < minimum else f"of at most {maximum}"
            raise refusal(f"expected a whole number {bound}, found {show(value)}.")
        return value

    return check


def boolean(value: object) -> bool:
    """True or false; also 1 and 0, as which mergekit writes them."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int | float) and value in (0, 1):
        return bool(value)
    word = value.lower() if isinstance(value, str) else ""
    hint = " Write true." if word in TRUE_WORDS else " Write false." if word in FALSE_WORDS else ""
    raise refusal(f"expected true or false, found {show(value)}.{hint or _unquote(value)}")


def choice(*options: str, also: Mapping[str, str] | None = None) -> Callable[[object], str]:
    """One of a few words; `also` maps words that are not taken to the one that was probably meant."""

    def check(value: object) -> str:
        if isinstance(value, str) and value in options:
            return value
        word = value if isinstance(value, str) else ""
        meant = (also or {}).get(word.lower())
        hint = f" Did you mean `{meant}`?" if meant else did_you_mean(word, options)
        raise refusal(f"expected {one_of(options)}, found {show(value)}.{hint}")

    return check


dtype = choice(*DTYPES, also=SHORT_DTYPES)
"""A floating-point dtype by its full name."""


def size(value: object) -> int:
    """A number of bytes: `5GB` (10^9), `5GiB` (2^30), `200MB`, or a whole number."""
    if isinstance(value, str) and (found := _SIZE.fullmatch(value)) and len(value) < 40:
        value = int(float(found[1]) * _UNITS[(found[2] or "").lower()])
    if isinstance(value, bool) or not isinstance(value, int):
        raise refusal(f"expected a size such as `5GB` or `200MiB`, found {show(value)}.")
    if not 1 <= value < 2**63:
        raise refusal(f"expected a size of at least one byte, found {show(value)}.")
    return value


def stored_precision(value: object) -> str | Literal[False]:
    """The dtype a sidecar is written as, or False for no sidecar."""
    if value is False:
        return False
    try:
        return choice("float32", "bfloat16", also={"bf16": "bfloat16", "fp32": "float32"})(value)
    except Refusal as error:
        raise refusal(str(error).replace("expected", "expected false,", 1)) from None


def several(check: Callable[[object], T], *, empty: bool = False) -> Callable[[object], tuple[T, ...]]:
    """A list of what `check` takes; of at least one unless `empty`."""

    def check_all(value: object) -> tuple[T, ...]:
        if not isinstance(value, list | tuple):
            raise refusal(f"expected a list, found {show(value)}.")
        if not value and not empty:
            raise refusal("an empty list; leave the key out instead.")
        found, problems = _each(check, enumerate(value))
        if problems:
            raise refusal(*problems)
        return tuple(entry for _, entry in found)

    return check_all


def entries(check: Callable[[object], T]) -> Callable[[object], Entries[T]]:
    """A mapping from names to what `check` takes; nothing is an empty one."""

    def check_all(value: object) -> Entries[T]:
        if value is None:
            return Entries()
        if not isinstance(value, Mapping):
            raise refusal(f"expected a mapping of names, found {show(value)}.")
        for key in value:
            if not isinstance(key, str):
                raise refusal(f"a key is text, found {show(key)}.")
        found, problems = _each(check, value.items())
        if problems:
            raise refusal(*problems)
        return Entries(tuple(found))

    return check_all


def optional(check: Callable[[object], T]) -> Callable[[object], T | None]:
    """Nothing, or what `check` takes."""
    return lambda value: None if value is None else check(value)


def parameter(schema: ParameterSchema, method: str) -> Callable[[object], Scalar]:
    """One scalar of a method's parameter: its type, its bounds, and what this version supports of it."""

    def check(value: object) -> Scalar:
        scalar = _TYPES[schema.type](value)
        if schema.only is not None and scalar != schema.only:
            reason = f" ({schema.help})" if schema.help else ""
            only = f"`{method}` supports only {show(schema.only)} here{reason}"
            raise refusal(f"{only}, found {show(value)}.")
        low, high = schema.minimum, schema.maximum
        if isinstance(scalar, int | float) and low is not None and scalar < low:
            raise refusal(f"expected at least {low:g}, found {show(value)}.")
        if isinstance(scalar, int | float) and high is not None and scalar > high:
            raise refusal(f"expected at most {high:g}, found {show(value)}.")
        return scalar

    return check


def any_scalar(value: object) -> Scalar:
    """Any scalar, for a parameter of a method that is not known."""
    if isinstance(value, bool | str):
        return value
    return number(value)


_TYPES: Mapping[type, Callable[[object], Scalar]] = {
    float: number,
    int: integer(-(2**63)),
    bool: boolean,
    str: text,
}


def _each(check: Callable[[object], T], items: Iterable[tuple[K, object]]) -> tuple[list[tuple[K, T]], list[Problem]]:
    found: list[tuple[K, T]] = []
    problems: list[Problem] = []
    for key, entry in items:
        try:
            found.append((key, check(entry)))
        except Refusal as error:
            problems += problems_of(error, key)
    return found, problems


def _unquote(value: object) -> str:
    if not isinstance(value, str) or len(value) > 40 or isinstance(resolve_scalar(value.strip()), str | None):
        return ""
    return " Remove the quotes."
