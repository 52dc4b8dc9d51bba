"""Parameters of merge methods: what a recipe may set, of which type, in which range.

Plain data and plain Python, so that recipes can be checked without importing torch.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergekit_bayes.errors import MethodError

Value = bool | int | float | str

TYPE_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a merge method, as a recipe's `parameters` may set it.

    Args:
        name: the key in the recipe.
        type: `bool`, `int`, `float` or `str`. A number 0 or 1 is accepted where a bool is wanted (mergekit's
            recipes write both), a whole number where a float is wanted; nothing else is converted.
        default: the value when the recipe does not set it.
        minimum: smallest legal number.
        maximum: largest legal number.
        help: one line for `bayes-merge methods`.
        only: the one value that is supported; the parameter exists so that recipes that set it to this value
            run unmodified, and all others are refused instead of ignored.
        per_source: the parameter may also be set for a single source (mergekit's `density`).
    """

    name: str
    type: type[bool] | type[int] | type[float] | type[str]
    default: Value
    minimum: float | None = None
    maximum: float | None = None
    help: str = ""
    only: Value | None = None
    per_source: bool = False

    def __post_init__(self) -> None:
        if self.type not in TYPE_WORDS:
            raise MethodError(f"parameter `{self.name}`: type {self.type!r} is none of bool, int, float, str")
        self.check(self.default)

    def check(self, value: object) -> Value:
        """Return `value` in the declared type.

        Raises:
            MethodError: the value has another type, is not finite, is out of range, or is not the one
                supported.
        """
        converted = self._convert(value)
        if self.only is not None and converted != self.only:
            raise MethodError(f"parameter `{self.name}` is {_shown(value)}; only {_shown(self.only)} is supported here")
        if isinstance(converted, int | float):
            if self.minimum is not None and converted < self.minimum:
                raise MethodError(f"parameter `{self.name}` is {converted}; it must be at least {self.minimum}")
            if self.maximum is not None and converted > self.maximum:
                raise MethodError(f"parameter `{self.name}` is {converted}; it must be at most {self.maximum}")
        return converted

    def _convert(self, value: object) -> Value:
        if type(value) is self.type and _finite(value):
            return self.type(value)
        if self.type is float and type(value) is int:
            return float(value)
        if self.type is bool and isinstance(value, int | float) and value in {0, 1}:
            return bool(value)
        raise MethodError(f"parameter `{self.name}` is {_shown(value)}; it must be {TYPE_WORDS[self.type]}")


def resolve_parameters(owner: str, declared: Sequence[Parameter], given: Mapping[str, object]) -> dict[str, object]:
    """Check `given` against `declared` and fill in the defaults.

    Args:
        owner: whose parameters these are, to open error messages with.
        declared: the legal parameters.
        given: values by name; names may be missing.

    Returns:
        One value per declared parameter, in declaration order.

    Raises:
        MethodError: an unknown name (the nearest one is offered) or an illegal value.
    """
    names = [parameter.name for parameter in declared]
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            known = ", ".join(f"`{each}`" for each in names) or "none besides `weight`"
            hint = f" Did you mean `{near[0]}`?" if near else ""
            raise MethodError(f"{owner} has no parameter `{name}`; it has {known}.{hint}")
    try:
        return {each.name: each.check(given.get(each.name, each.default)) for each in declared}
    except MethodError as error:
        raise MethodError(f"{owner}: {error}") from None


def _finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _shown(value: object) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
