r"""Plain scalars of YAML 1.2 (core schema): what an unquoted word means.

    null  ~ or nothing           true / false           12   0x1F   0o17
    1e-4  .5  -3.0  .inf  .nan   anything else is text

Note:
    Readers of YAML 1.1 take `yes` and `no` for booleans, `012` for octal, `12:30` for a number to base 60,
    `1e-4` for text and `2024-01-01` for a date. Here the table above decides and nothing else.
"""

from __future__ import annotations

import re
from typing import TypeAlias

from mergekit_bayes.recipe.problem import refusal

Scalar: TypeAlias = bool | int | float | str
ScalarType: TypeAlias = type[bool] | type[int] | type[float] | type[str]

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOLEAN = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_BASED = re.compile(r"0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def resolve_scalar(text: str) -> Scalar | None:
    """The value of a plain (unquoted) scalar.

    Raises:
        Refusal: an integer of more digits than Python reads at once.
    """
    if text in _NULL:
        return None
    if text in _BOOLEAN:
        return _BOOLEAN[text]
    if _INTEGER.fullmatch(text) or _BASED.fullmatch(text):
        return _integer(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if special := _SPECIAL.fullmatch(text):
        return float("nan") if special[3] else float(special[1] + "inf")
    return text


def _integer(text: str) -> int:
    if len(text) > 300:
        raise refusal(f"expected a number, found one of {len(text)} digits.")
    return int(text, 0) if _BASED.fullmatch(text) else int(text, 10)
