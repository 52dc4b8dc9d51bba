"""What no single value can show: weights that are missing or all zero, a model listed twice.

These checks look at the plain data, so that they are reported together with the faults of single values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mergekit_bayes.recipe import field
from mergekit_bayes.recipe.method_schema import MethodSchema
from mergekit_bayes.recipe.problem import Problem, Refusal, did_you_mean, format_path
from mergekit_bayes.recipe.reference import model_reference
from mergekit_bayes.recipe.scalar import Scalar
from mergekit_bayes.recipe.value import decides_for_all, parse_value, scalars_of


def consistency_problems(data: Mapping[str, object], method: MethodSchema) -> list[Problem]:
    """Everything that is wrong between values which may each be right.

    Args:
        data: the recipe as plain data; faulty values in it are left to those who check them.
        method: the method it names.
    """
    return [*_repeated(data), *_weights(data, method)]


def _repeated(data: Mapping[str, object]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, entry in _entries(data):
        name = _reference(entry.get("model"))
        if name is None:
            continue
        if name in first:
            other = format_path(("models", first[name]))
            yield Problem(("models", index, "model"), f"the same model as `{other}`; list it once.")
        first.setdefault(name, index)


def _weights(data: Mapping[str, object], method: MethodSchema) -> Iterator[Problem]:
    base = _reference(data.get("base_model")) if method.base != "unused" else None
    shared = _mapping(data.get("parameters"))
    found: list[tuple[Scalar, ...] | None] = []
    for index, entry in _entries(data):
        own = _mapping(entry.get("parameters"))
        if base is not None and _reference(entry.get("model")) == base:
            continue  # its task vector is zero; mergekit's recipes list the base without a weight
        found.append(_weights_in([own, shared]))
        if "weight" not in own and "weight" not in shared and not _misspelt(entry, own, shared):
            path = ("models", index, "parameters", "weight")
            yield Problem(path, f"missing; `{method.name}` needs a weight for every model.")
    if found and all(weights and not any(weights) for weights in found):
        yield Problem(("models",), "every weight is zero, so there is nothing to merge.")


def _weights_in(scopes: Sequence[Mapping[str, object]]) -> tuple[Scalar, ...] | None:
    """Every weight that some tensor may get, looking from the narrowest scope outwards; None if one is faulty."""
    weights: list[Scalar] = []
    for scope in scopes:
        if "weight" not in scope:
            continue
        try:
            value = parse_value(scope["weight"], field.number)
        except Refusal:
            return None
        weights += scalars_of(value)
        if decides_for_all(value):
            break
    return tuple(weights)


def _misspelt(entry: Mapping[str, object], *scopes: Mapping[str, object]) -> bool:
    """Whether a key that is reported anyway stands for the weight, or for the mapping it belongs in."""
    if entry.get("parameters") is not None and not isinstance(entry["parameters"], Mapping):
        return True
    return any(did_you_mean(str(key), ("weight", "parameters")) for key in entry if key != "parameters") or any(
        did_you_mean(str(key), ("weight",)) for scope in scopes for key in scope
    )


def _reference(raw: object) -> str | None:
    try:
        return model_reference(raw)
    except Refusal:
        return None


def _entries(data: Mapping[str, object]) -> Iterator[tuple[int, Mapping[str, object]]]:
    models = data.get("models")
    for index, entry in enumerate(models if isinstance(models, list | tuple) else ()):
        if isinstance(entry, Mapping):
            yield index, entry


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}
