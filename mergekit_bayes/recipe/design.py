"""The sections `design` and `budget` of a preview: which mixes are looked at, and how much they may cost.

design: {kind: simplex, step: 0.1}
design: {kind: simplex, partitions: 4, scales: [0.5, 1, 2]}
design: {kind: random, points: 40}
design: {kind: list, weights: [[1, 0], [0.5, 0.5]]}
budget: {points: 60, minutes: 5}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Literal

from mergekit_bayes.recipe import field
from mergekit_bayes.recipe.problem import Problem, refusal, show
from mergekit_bayes.recipe.spec import Spec, checked

_KINDS = field.choice(
    "simplex",
    "random",
    "list",
    also={"grid": "simplex", "lattice": "simplex", "das_dennis": "simplex", "dirichlet": "random", "explicit": "list"},
)
_OF_KIND: Mapping[str, tuple[str, ...]] = {
    "simplex": ("step", "partitions"),
    "random": ("points", "concentration"),
    "list": ("weights",),
}
LARGEST_DESIGN = 100_000


def _step(value: object) -> float:
    step = field.between(0, 1, above=True)(value)
    if abs(round(1 / step) * step - 1) > 1e-6:
        raise refusal(
            f"found {show(value)}, of which no whole number of steps makes one; expected 0.1, 0.05 or the like."
        )
    return step


class DesignSpec(Spec):
    """Which mixes of weights are looked at.

    Attributes:
        kind: `simplex`, a lattice of weights that sum to one; `random`, uniform on the simplex; `list`, given ones.
        step: of the lattice.
        partitions: of the lattice, instead of a step: weights are multiples of one over it.
        points: how many random mixes.
        concentration: of the Dirichlet distribution they come from; 1 is uniform.
        weights: the mixes, each with one weight per model.
        scales: every mix is looked at multiplied by each of these; 1 leaves the simplex as it is.
        adaptive: evaluate a part of the budget as the design has it, and the rest where the front is expected to grow.
    """

    kind: Annotated[Literal["simplex", "random", "list"], checked(_KINDS)] = "simplex"
    step: Annotated[float | None, checked(field.optional(_step))] = None
    partitions: Annotated[int | None, checked(field.optional(field.integer(1, 10_000)))] = None
    points: Annotated[int | None, checked(field.optional(field.integer(1, LARGEST_DESIGN)))] = None
    concentration: Annotated[float, checked(field.positive)] = 1.0
    weights: Annotated[tuple[tuple[float, ...], ...], checked(field.several(field.several(field.number)))] = ()
    scales: Annotated[tuple[float, ...], checked(field.several(field.positive))] = (1.0,)
    adaptive: Annotated[bool, checked(field.boolean)] = False

    def without_effect(self) -> frozenset[str]:
        """What belongs to other kinds."""
        return frozenset(name for kind, names in _OF_KIND.items() if kind != self.kind for name in names)


class BudgetSpec(Spec):
    """How much is evaluated at most; what does not fit is skipped, and said.

    Attributes:
        points: evaluated mixes, of all methods together.
        minutes: of evaluation.
    """

    points: Annotated[int | None, checked(field.optional(field.integer(1)))] = None
    minutes: Annotated[float | None, checked(field.optional(field.positive))] = None


def design_mapping(value: object) -> object:
    """The section written out, also where it is only a step or a list of mixes."""
    if value is None:
        return {}
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"kind": "simplex", "step": value}
    return {"kind": "list", "weights": value} if isinstance(value, list | tuple) else value


def design_problems(value: object, models: int | None) -> Iterator[Problem]:
    """What no single value of a design can show.

    Args:
        value: the section as plain data.
        models: how many models there are; None if that is not known.
    """
    found = design_mapping(value)
    if not isinstance(found, Mapping):
        return
    kind = found.get("kind", "simplex")
    names = _OF_KIND.get(kind, ()) if isinstance(kind, str) else ()
    for other, theirs in _OF_KIND.items():
        for name in theirs:
            if name in found and name not in names and names:
                yield Problem(("design", name), f"belongs to `kind: {other}`; this design is `{kind}`.", at_key=True)
    if kind == "simplex" and found.get("step") is not None and found.get("partitions") is not None:
        yield Problem(("design", "partitions"), "partitions beside `step`; keep one of them.", at_key=True)
    if kind == "random" and found.get("points") is None:
        yield Problem(("design", "points"), "missing; say how many random mixes there are.")
    if kind == "list":
        yield from _list_problems(found.get("weights"), models)


def _list_problems(weights: object, models: int | None) -> Iterator[Problem]:
    if weights is None:
        yield Problem(("design", "weights"), "missing; list the mixes, each with one weight per model.")
    for index, mix in enumerate(weights if isinstance(weights, list | tuple) else ()):
        path = ("design", "weights", index)
        if isinstance(mix, list | tuple) and models is not None and len(mix) != models:
            yield Problem(path, f"{len(mix)} weights for {models} models; expected one for each.")
        elif isinstance(mix, list | tuple) and mix and not any(mix):
            yield Problem(path, "every weight is zero, so there is nothing to merge.")
