"""From plain data to an evaluation recipe, with every problem of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from mergekit_bayes.recipe.evaluate import EVALUATE_SPECS, METRICS, OF_MODELS_ON_DISK, OF_ROWS, EvaluateRecipe
from mergekit_bayes.recipe.merge_check import check_merge
from mergekit_bayes.recipe.method_schema import MethodSchema
from mergekit_bayes.recipe.problem import KeyPath, Problem, did_you_mean, one_of, show
from mergekit_bayes.recipe.wording import Place, Wording, validate

_Data = Mapping[str, object]

_INSTEAD = frozenset({"path", "adapter"})  # written in place of `model`, and refused as what they are
_INSTEAD_OF_DATA = frozenset({"dataset", "eval"})
_ALL = frozenset(name for names in METRICS.values() for name in names)


def check_evaluate(data: _Data, methods: Sequence[MethodSchema]) -> tuple[EvaluateRecipe | None, list[Problem]]:
    """The recipe with every default filled in, or what is wrong with it.

    Args:
        data: the recipe as plain data.
        methods: the merge methods there are; without them, merges that are written out are checked when they are made.
    """
    recipe, problems = validate(EvaluateRecipe, data, _WORDING)
    problems += [*_model_problems(data), *_merge_problems(data, methods)]
    problems += [*_subject_problems(data)]
    problems += [*_name_problems(data), *_temperature_problems(data), *_metric_problems(data), *_mixture_problems(data)]
    return recipe, problems


def _entries(data: _Data) -> Iterator[tuple[int, object]]:
    given = data.get("models")
    entries = given if isinstance(given, list | tuple) else [] if given is None else [given]
    yield from enumerate(entries)


def _title(entry: object) -> str | None:
    if not isinstance(entry, Mapping):
        return entry if isinstance(entry, str) else None
    found = entry.get("name") or entry.get("model") or entry.get("merge")
    return found if isinstance(found, str) else None


def _model_problems(data: _Data) -> Iterator[Problem]:
    """Entries that name no model, or two."""
    for index, entry in _entries(data):
        if not isinstance(entry, Mapping):
            continue
        path = ("models", index)
        model, merge = entry.get("model"), entry.get("merge")
        if model is None and merge is None and not _INSTEAD & entry.keys():
            yield Problem((*path, "model"), "missing; every entry names a `model`, or the recipe of a `merge`.")
        if model is not None and merge is not None:
            yield Problem((*path, "merge"), "beside a `model`; keep one of them.", at_key=True)
        if isinstance(merge, Mapping) and not entry.get("name"):
            yield Problem((*path, "name"), "missing; say what tables call this merge.")
        for name in OF_MODELS_ON_DISK if merge is not None and model is None else ():
            if entry.get(name) is not None:
                yield Problem((*path, name), "has no effect; the recipe of the merge says it. Remove it.", at_key=True)


def _merge_problems(data: _Data, methods: Sequence[MethodSchema]) -> Iterator[Problem]:
    """What the check of merge recipes has to say about those that are written out."""
    for index, entry in _entries(data):
        merge = entry.get("merge") if isinstance(entry, Mapping) else None
        if not methods or not isinstance(merge, Mapping):
            continue
        path = ("models", index, "merge")
        if merge.get("kind", "merge") != "merge":
            yield Problem((*path, "kind"), f"expected a recipe of kind `merge`, found {show(merge['kind'])}.")
            continue
        _, problems = check_merge(merge, methods)
        yield from (replace(problem, path=(*path, *problem.path)) for problem in problems)


def _name_problems(data: _Data) -> Iterator[Problem]:
    known: dict[str, int] = {}
    for index, entry in _entries(data):
        title = _title(entry)
        if title is not None and title in known:
            message = f"has the name of `models[{known[title]}]`; give it a `name` of its own."
            yield Problem(("models", index), message)
        if title is not None:
            known.setdefault(title, index)
    baseline = data.get("baseline")
    if isinstance(baseline, str) and known and baseline not in known:
        hint = did_you_mean(baseline, known) or f" Those are {one_of(known, 'and')}."
        yield Problem(("baseline",), f"is the name of no model.{hint}")


def _subject_problems(data: _Data) -> Iterator[Problem]:
    """Nothing to evaluate on, or keys about rows where there are none."""
    asked = data.get("lm_eval") is not None
    if asked and data.get("task") == "sequence_classification":
        message = "tasks of the harness are put to language models; remove `lm_eval`, or `task`."
        yield Problem(("lm_eval",), message, at_key=True)
    if data.get("data") is not None:
        return
    if not asked and not _INSTEAD_OF_DATA & data.keys():
        message = "missing; name the rows to evaluate on, such as `data: held_out.jsonl`, or tasks of `lm_eval`."
        yield Problem(("data",), message)
    for name in OF_ROWS if asked else ():
        if data.get(name) is not None:
            yield Problem((name,), "is about the rows of `data`, and there are none; remove it.", at_key=True)


def _temperature_problems(data: _Data) -> Iterator[Problem]:
    sections: list[tuple[KeyPath, object]] = [(("samples",), data.get("samples"))]
    sections += [(("models", i, "samples"), e.get("samples")) for i, e in _entries(data) if isinstance(e, Mapping)]
    chosen = [
        path
        for path, section in sections
        if isinstance(section, Mapping) and section.get("temperature") == "validation"
    ]
    if data.get("validation") is None:
        message = "is chosen on the rows of `validation`, which is missing; name them, or write a number."
        yield from (Problem((*path, "temperature"), message) for path in chosen)
    elif not chosen:
        message = "has no effect; only `samples: {temperature: validation}` reads it. Remove one or add the other."
        yield Problem(("validation",), message, at_key=True)


def _metric_problems(data: _Data) -> Iterator[Problem]:
    task, metrics = data.get("task"), data.get("metrics")
    names = [metrics] if isinstance(metrics, str) else metrics
    if not isinstance(names, list | tuple):
        return
    if isinstance(task, str) and task in METRICS:
        for index, name in enumerate(names):
            if name in _ALL and name not in METRICS[task]:
                listing = one_of(METRICS[task], "and")
                yield Problem(("metrics", index), f"`{name}` is none of `{task}`; those are {listing}.")
    elif set(map(str, names)) <= _ALL and not any(set(names) <= set(of_task) for of_task in METRICS.values()):
        yield Problem(("metrics",), "belong to several tasks; one evaluation has models of one task.")
    if "coverage" in data and "selective_accuracy" not in names:
        yield Problem(("coverage",), "has no effect without `selective_accuracy` in `metrics`.", at_key=True)


def _mixture_problems(data: _Data) -> Iterator[Problem]:
    for section in ("data", "validation"):
        given = data.get(section)
        entries = given.get("eval") if isinstance(given, Mapping) else given
        for index, entry in enumerate(entries if isinstance(entries, list | tuple) else [entries]):
            if isinstance(entry, Mapping) and entry.get("weight") is not None:
                message = "is of training mixtures; every row is evaluated once. Remove it."
                yield Problem((section, "eval", index, "weight"), message, at_key=True)


_MEANT = {
    "adapter": "`models`, as `base+adapter`, or the adapter's own folder",
    "base": "`base_model`",
    "dataset": "`data`",
    "eval": "`data`",
    "model": "`models`",
    "num_samples": "`samples.count`",
    "prior": "`samples.prior`",
    "prior_precision": "`samples.prior`",
    "temperature": "`samples.temperature`",
    "max_length": "`data.max_length`",
    "labels": "`data.labels`",
    "reference": "`baseline`",
    "per_device_eval_batch_size": "`batch_size`",
}


def _foreign(place: Place, name: str) -> str | None:
    return f"unknown key. Here it is {_MEANT[name]}." if place == () and name in _MEANT else None


_WORDING = Wording(
    EVALUATE_SPECS,
    required={
        "models": "list what is evaluated, such as `models: [base, tuned]`.",
        "tasks": "name tasks of lm-eval-harness, such as `lm_eval: [hellaswag]`.",
        "eval": "list what to evaluate on, each `- path: ...`.",
        "path": "name a file, a folder or a hub id.",
    },
    foreign=_foreign,
    stand_ins={
        "models": frozenset({"model", "path"}),
        "eval": frozenset({"path", "file", "files", "test", "validation"}),
    },
)
