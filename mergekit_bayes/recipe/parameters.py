"""The `parameters` of a recipe or of one of its models, checked against the method that takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mergekit_bayes.recipe import field
from mergekit_bayes.recipe.method_schema import MethodSchema, ParameterSchema
from mergekit_bayes.recipe.problem import Problem, Refusal, did_you_mean, problems_of, refusal, show
from mergekit_bayes.recipe.scalar import Scalar
from mergekit_bayes.recipe.spec import Entries
from mergekit_bayes.recipe.value import Value, parse_value, plain_value, value_at


class Parameters(Entries[Value]):
    """An immutable mapping from parameter names to values, in the order of the recipe."""

    def at(self, name: str, tensor_name: str, t: float) -> Scalar | None:
        """The parameter's value for one tensor; None when it is not set or no filter matches the tensor."""
        value = self.get(name)
        return None if value is None else value_at(value, tensor_name, t)

    def plain(self) -> dict[str, object]:
        """The plain data these parameters were read from."""
        return {name: plain_value(value) for name, value in self.entries}


def parse_parameters(raw: object, method: MethodSchema | None, *, per_source: bool) -> Parameters:
    """Read a mapping of parameters.

    Args:
        raw: what the recipe says; nothing is an empty mapping.
        method: the method that takes them; None (an unknown method) leaves names and types unchecked.
        per_source: they belong to one model, which only takes parameters that may differ between models.

    Raises:
        Refusal: every fault, each with its place.
    """
    if raw is None:
        return Parameters()
    if not isinstance(raw, Mapping):
        raise refusal(f"expected a mapping such as `{{weight: 0.5}}`, found {show(raw)}.")
    entries: list[tuple[str, Value]] = []
    problems: list[Problem] = []
    for name, value in raw.items():
        try:
            entries.append((name, _parse_entry(name, value, method, per_source=per_source)))
        except Refusal as error:
            problems += problems_of(error, name if isinstance(name, str) else show(name))
    if problems:
        raise refusal(*problems)
    return Parameters(tuple(entries))


def _parse_entry(name: object, value: object, method: MethodSchema | None, *, per_source: bool) -> Value:
    if not isinstance(name, str):
        raise refusal(Problem((), "a key is text.", at_key=True))
    if value is None:
        raise refusal("has no value.")
    if method is None:
        return parse_value(value, field.any_scalar)
    schema = method.parameter(name)
    if schema is None or (per_source and not schema.per_source):
        message = _unknown(name, schema, method, per_source=per_source)
        raise refusal(Problem((), message, at_key=True))
    return parse_value(value, field.parameter(schema, method.name))


def _unknown(name: str, schema: ParameterSchema | None, method: MethodSchema, *, per_source: bool) -> str:
    if schema is not None:
        return "the same for all models; write it under `parameters` at the top of the recipe."
    allowed = [p.name for p in method.all_parameters() if p.per_source or not per_source]
    return f"`{method.name}` has no such parameter.{did_you_mean(name, allowed) or _known(allowed)}"


def _known(names: Sequence[str]) -> str:
    return f" It takes {', '.join(f'`{name}`' for name in names)}."
