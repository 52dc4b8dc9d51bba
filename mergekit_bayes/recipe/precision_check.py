"""From plain data to a precision recipe, with every problem of it.

Like the checks of a fine-tuning recipe, those between keys look at the plain data: they are reported together with the
faults of single values, and a value that is faulty itself is left to those who check it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from mergekit_bayes.precision.registry import ESTIMATORS, EstimatorSpec
from mergekit_bayes.recipe.estimator import estimator_choice
from mergekit_bayes.recipe.finetune_consistency import bit_problems, data_problems
from mergekit_bayes.recipe.method_schema import MethodSchema
from mergekit_bayes.recipe.precision import PRECISION_SPECS, STATE_SILENCES, PrecisionRecipe
from mergekit_bayes.recipe.problem import Problem, Refusal, one_of
from mergekit_bayes.recipe.wording import Place, Wording, validate

_Mapping = Mapping[str, object]


def check_precision(data: _Mapping, methods: Sequence[MethodSchema]) -> tuple[PrecisionRecipe | None, list[Problem]]:
    """The recipe with every default filled in, or what is wrong with it.

    Args:
        data: the recipe as plain data.
        methods: not needed; nothing is merged.
    """
    recipe, problems = validate(PrecisionRecipe, data, _WORDING)
    problems += [*bit_problems(data), *data_problems(data), *_problems(data)]
    return (_with_space(recipe) if recipe else None), problems


def _with_space(recipe: PrecisionRecipe) -> PrecisionRecipe:
    if recipe.space is not None:
        return recipe
    kronecker = ESTIMATORS[recipe.estimator.name].family == "kronecker"
    adapted = "product" if kronecker else "factor"
    return recipe.model_copy(update={"space": "full" if recipe.adapter is None else adapted})


def _problems(data: _Mapping) -> Iterator[Problem]:
    yield from _held_out(data)
    yield from _quantised(data)
    estimator = _estimator(data)
    if estimator is not None:
        yield from _space(data, estimator)
        yield from _source(data, estimator)


def _estimator(data: _Mapping) -> EstimatorSpec | None:
    """The estimator, as far as its name is right."""
    given = data.get("estimator")
    name = given.get("name") if isinstance(given, Mapping) else given
    try:
        return ESTIMATORS[estimator_choice(name).name]
    except Refusal:
        return None


def _held_out(data: _Mapping) -> Iterator[Problem]:
    rows = data.get("data")
    for key in ("eval", "eval_fraction"):
        if isinstance(rows, Mapping) and rows.get(key) is not None:
            yield Problem(("data", key), "a precision pass holds nothing out; remove it.", at_key=True)


def _quantised(data: _Mapping) -> Iterator[Problem]:
    if data.get("adapter") is not None:
        return
    model = data.get("model")
    for key in ("load_in_4bit", "load_in_8bit"):
        if isinstance(model, Mapping) and model.get(key) in (True, 1):
            message = "quantised weights have no gradient; name the `adapter` on them, or load them whole."
            yield Problem(("model", key), message)


def _space(data: _Mapping, estimator: EstimatorSpec) -> Iterator[Problem]:
    space, adapted = data.get("space"), data.get("adapter") is not None
    if space in ("factor", "product") and not adapted:
        yield Problem(("space",), f"`{space}` describes an adapter; add `adapter`, or write `full`.")
    elif space == "full" and adapted:
        yield Problem(("space",), "`full` describes a model without adapter; write `factor` or `product`.")
    elif isinstance(space, str) and space in ("factor", "product", "full") and space not in estimator.spaces:
        there = one_of(estimator.spaces, "and")
        yield Problem(("space",), f"`{estimator.name}` describes the spaces {there}, found `{space}`.")


def _source(data: _Mapping, estimator: EstimatorSpec) -> Iterator[Problem]:
    if estimator.source == "data":
        if data.get("data") is None:
            message = f"missing; `{estimator.name}` looks at rows, such as `data: {{train: train.jsonl}}`."
            yield Problem(("data",), message)
        if data.get("optimizer_state") is not None:
            message = f"`{estimator.name}` reads no optimizer; remove it, or use `estimator: adam`."
            yield Problem(("optimizer_state",), message, at_key=True)
        return
    if data.get("data") is not None:
        message = f"`{estimator.name}` reads `optimizer_state` and looks at no rows; remove it."
        yield Problem(("data",), message, at_key=True)
    for key, what in _NEEDED_BY_STATE.items():
        if data.get(key) is None:
            yield Problem((key,), f"missing; {what}")
    for key in sorted(STATE_SILENCES & data.keys()):
        yield Problem((key,), f"has no effect on `estimator: {estimator.name}`; remove it.", at_key=True)


_NEEDED_BY_STATE = {
    "optimizer_state": "`adam` reads the state that training left, such as `optimizer.pt` of a checkpoint.",
    "training_units": "`adam` sees no data; give N, the tokens (or labelled examples) that were learned from.",
    "batch_size": "`adam` averaged squared gradients of batches; give their training units per optimizer step.",
}

_MEANT = {
    "method": "`estimator`",
    "optimizer": "`estimator`",
    "num_samples": "`num_examples`",
    "max_examples": "`num_examples`",
    "samples": "`num_examples`",
    "max_samples": "`num_examples`",
    "max_rows": "`max_rows` in an entry of `data.train`, or `num_examples`",
    "num_training_examples": "`training_units`",
    "optimizer_path": "`optimizer_state`",
    "state": "`optimizer_state`",
    "weight_decay": "`prior.weight_decay`",
    "prior_precision": "`prior.weight_decay`, which is the prior precision over N",
    "damping": "`prior.weight_decay`",
    "per_device_train_batch_size": "`batch_size`",
    "task": "`model.task`",
    "dataset": "`data.train`",
    "train": "`data.train`",
    "path": "`model.path`",
    "base_model": "`model`",
    "lora": "`adapter`",
    "peft": "`adapter`",
}


def _foreign(place: Place, name: str) -> str | None:
    return f"unknown key. Here it is {_MEANT[name]}." if place == () and name in _MEANT else None


_WORDING = Wording(
    PRECISION_SPECS,
    required={
        "model": "name the model, or the base of the adapter: a folder or hub id.",
        "path": "name a folder, a file or a hub id.",
        "train": "list the rows to look at, each `- path: ...`.",
        "estimator": f"say how: {one_of(ESTIMATORS)}.",
    },
    foreign=_foreign,
    stand_ins={
        "model": frozenset({"path", "base_model", "model_path"}),
        "path": frozenset({"name", "id", "file", "files", "model"}),
        "train": frozenset({"dataset", "datasets", "path"}),
        "estimator": frozenset({"method", "optimizer"}),
    },
)
