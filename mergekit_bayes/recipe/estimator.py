"""The section `estimator` of a precision recipe: how the curvature is estimated.

estimator: fisher
estimator: {name: kfac, eigenvalues: true}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from mergekit_bayes.precision.registry import ESTIMATORS, Option
from mergekit_bayes.recipe import field
from mergekit_bayes.recipe.problem import Problem, Refusal, did_you_mean, problems_of, refusal, show
from mergekit_bayes.recipe.spec import Entries, Spec

_name = field.choice(
    *ESTIMATORS,
    also={
        "adamw": "adam",
        "optimizer": "adam",
        "ekfac": "kfac",
        "ek-fac": "kfac",
        "k-fac": "kfac",
        "kronecker": "kfac",
        "regmean": "gram",
        "diagonal_fisher": "fisher",
        "diag_fisher": "fisher",
        "true_fisher": "fisher",
        "empirical": "empirical_fisher",
        "emp_fisher": "empirical_fisher",
        "gauss_newton": "ggn",
        "gauss-newton": "ggn",
    },
)


class EstimatorChoice(Spec):
    """An estimator with its options.

    Attributes:
        name: of the estimator, as in `precision.registry`.
        options: all of its options, in the order of that page.
    """

    name: str
    options: Entries[bool | int | float] = Entries()

    def plain(self) -> dict[str, object]:
        """Returns name and options side by side, as a recipe has them."""
        return {"name": self.name, **self.options.plain()}


def estimator_choice(value: object) -> EstimatorChoice:
    """Returns the section with every option of the estimator filled in; a name stands for a mapping of it alone."""
    if isinstance(value, EstimatorChoice):
        return value
    if not isinstance(value, Mapping):
        return estimator_choice({"name": _name(value)})
    if "name" not in value:
        raise refusal(Problem(("name",), "missing; name the estimator, such as `estimator: {name: fisher}`."))
    try:
        name = _name(value["name"])
    except Refusal as error:
        raise refusal(*problems_of(error, "name")) from None
    given = {key: entry for key, entry in value.items() if key != "name"}
    options = ESTIMATORS[name].options
    problems = list(_unknown(name, given))
    entries = []
    for option in options:
        try:
            entries.append((option.name, _checked(option)(given.get(option.name, option.default))))
        except Refusal as error:
            problems += problems_of(error, option.name)
    if problems:
        raise refusal(*problems)
    return EstimatorChoice(name=name, options=Entries(tuple(entries)))


def _unknown(name: str, given: Mapping[object, object]) -> list[Problem]:
    known = [option.name for option in ESTIMATORS[name].options]
    problems = []
    for key in given:
        if not isinstance(key, str):
            problems.append(Problem((), f"a key is text, found {show(key)}."))
        elif key not in known:
            owners = [each.name for each in ESTIMATORS.values() if key in {option.name for option in each.options}]
            owner = f" It is an option of {', '.join(f'`{other}`' for other in owners)}." if owners else ""
            there_are = f" It has {', '.join(f'`{each}`' for each in known)}." if known else " It has none."
            hint = owner or did_you_mean(key, known) or there_are
            problems.append(Problem((key,), f"no option of `{name}`.{hint}", at_key=True))
    return problems


def _checked(option: Option) -> Callable[[object], bool | int | float]:
    if isinstance(option.default, bool):
        return field.boolean
    if isinstance(option.default, int):
        return field.integer(int(option.minimum or 0))
    return field.number if option.minimum is None else field.between(option.minimum)
