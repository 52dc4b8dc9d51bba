"""From plain data to a preview recipe, with every problem of it.

A preview is a merge at many weights, so what a merge recipe may say is checked by the check of merge recipes, once for
every method, and reported where the preview says it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath

from mergekit_bayes.recipe.design import design_problems
from mergekit_bayes.recipe.merge_check import check_merge
from mergekit_bayes.recipe.method_schema import MethodSchema
from mergekit_bayes.recipe.preview import PREVIEW_SPECS, PreviewRecipe, merge_mapping
from mergekit_bayes.recipe.problem import KeyPath, Problem, one_of
from mergekit_bayes.recipe.wording import Place, Wording, validate

_Data = Mapping[str, object]

_TRIED_WEIGHT = 1.0  # stands for the weights of the design while a method's recipe is checked


def check_preview(data: _Data, methods: Sequence[MethodSchema]) -> tuple[PreviewRecipe | None, list[Problem]]:
    """The recipe with every default filled in, or what is wrong with it.

    Args:
        data: the recipe as plain data.
        methods: the merge methods there are.
    """
    recipe, problems = validate(PreviewRecipe, data, _WORDING)
    problems += [*_method_problems(data, methods), *_weights_given(data), *_task_problems(data)]
    problems += _place_problems(data)
    problems += [*design_problems(data.get("design"), len(_list(data, "models")) or None), *_reference_problems(data)]
    return recipe, list(dict.fromkeys(problems))


def _place_problems(data: _Data) -> Iterator[Problem]:
    evaluation = data.get("evaluation")
    if isinstance(evaluation, Mapping) and evaluation.get("device") and evaluation.get("device_map"):
        yield Problem(("evaluation", "device"), "one device beside `device_map`; keep one of them.", at_key=True)


def _list(data: _Data, name: str) -> Sequence[object]:
    value = data.get(name)
    return value if isinstance(value, list | tuple) else ()


def _mappings(data: _Data, name: str) -> Iterator[tuple[int, _Data]]:
    yield from ((index, entry) for index, entry in enumerate(_list(data, name)) if isinstance(entry, Mapping))


def _method_problems(data: _Data, methods: Sequence[MethodSchema]) -> Iterator[Problem]:
    one, several = data.get("merge_method"), data.get("methods")
    if one is None and several is None:
        yield Problem(("methods",), "missing; list what is compared, such as `methods: [task_arithmetic, posterior]`.")
        return
    if one is not None and several is not None:
        yield Problem(("merge_method",), "one method beside a list of `methods`; keep one of them.", at_key=True)
        return
    if several is not None and data.get("parameters"):
        yield Problem(("parameters",), "belongs to one method; write it under `methods[i].parameters`.", at_key=True)
    entries = [several] if isinstance(several, str | Mapping) else several
    if one is not None:
        yield from _problems_of_merge(data, {"merge_method": one, "parameters": data.get("parameters")}, (), methods)
        return
    titles: list[object] = []
    for index, entry in enumerate(entries if isinstance(entries, list | tuple) else ()):
        method = {"merge_method": entry} if isinstance(entry, str) else entry
        if not isinstance(method, Mapping):
            continue
        yield from _problems_of_merge(data, method, ("methods", index), methods)
        titles.append(method.get("name") or method.get("merge_method"))
        if titles[-1] in titles[:-1]:
            yield Problem(("methods", index), "has the name of another entry; give it a `name` of its own.")


def _problems_of_merge(data: _Data, method: _Data, place: KeyPath, methods: Sequence[MethodSchema]) -> list[Problem]:
    """What the check of merge recipes has to say about one method, at the places of the preview."""
    count = len(_list(data, "models"))
    mapping = merge_mapping(data, method, [_TRIED_WEIGHT] * count)
    _, problems = check_merge({key: value for key, value in mapping.items() if value is not None}, methods)
    found = []
    for problem in problems:
        of_the_preview = problem.path[-1:] in (("model",), ("base_model",), ("models",), ("merge_method",))
        if of_the_preview and problem.message.startswith("missing"):
            continue  # the check of the preview itself says so
        found.append(replace(problem, path=_at(problem.path, method, place)))
    return found


def _at(path: KeyPath, method: _Data, place: KeyPath) -> KeyPath:
    if place and path and (path[0] == "merge_method" or path[0] in method):
        return (*place, *path)
    return path


def _weights_given(data: _Data) -> Iterator[Problem]:
    for index, source in _mappings(data, "models"):
        own = source.get("parameters")
        if isinstance(own, Mapping) and "weight" in own:
            path = ("models", index, "parameters", "weight")
            yield Problem(path, "the weights of a preview come from its `design`; remove it.", at_key=True)


def _task_problems(data: _Data) -> Iterator[Problem]:
    tasks = _list(data, "tasks")
    if len(tasks) == 1:
        yield Problem(("tasks",), "one task; a trade-off needs at least two.")
    models = [entry.get("model") for _, entry in _mappings(data, "models")]
    evaluated = {"evaluated", "fitted"} & set(_fidelities(data))
    named: dict[object, int] = {}
    for index, task in _mappings(data, "tasks"):
        expert = task.get("model")
        if expert is not None and expert not in models:
            listing = f" Those are {one_of([str(model) for model in models], 'and')}." if models else ""
            yield Problem(("tasks", index, "model"), f"is none of `models`, of which it should be the expert.{listing}")
        if expert is None and index >= len(models) > 0:
            yield Problem(("tasks", index, "model"), "missing; name the model that was trained for it.")
        if evaluated and task.get("data") is None and task.get("lm_eval") is None:
            yield Problem(("tasks", index, "data"), "missing; only `fidelity: surrogate` needs no data.")
        if task.get("lm_eval") is not None:
            yield from _harness_problems(index, task, data)
        yield from _directions(index, task)
        name = task.get("name") or _last_part(expert or (models[index] if index < len(models) else None))
        if name is not None and name in named:
            yield Problem(("tasks", index), f"has the name of `tasks[{named[name]}]`; give it a `name` of its own.")
        named.setdefault(name, index)


def _harness_problems(index: int, task: _Data, data: _Data) -> Iterator[Problem]:
    """What does not go with a task of lm-eval-harness."""
    if task.get("data") is not None:
        yield Problem(("tasks", index, "lm_eval"), "beside `data`; keep one of them.", at_key=True)
    if task.get("max_rows") is not None:
        yield Problem(("tasks", index, "max_rows"), "is about rows; write `lm_eval: {limit: ...}`.", at_key=True)
    evaluation = data.get("evaluation")
    if isinstance(evaluation, Mapping) and evaluation.get("task") not in (None, "causal_lm"):
        message = "tasks of the harness are put to language models; remove it, or `evaluation.task`."
        yield Problem(("tasks", index, "lm_eval"), message, at_key=True)


def _last_part(model: object) -> str | None:
    return PurePath(model).name if isinstance(model, str) else None


def _directions(index: int, task: _Data) -> Iterator[Problem]:
    if task.get("lm_eval") is not None:
        return  # the harness says it, and has other metrics of these names
    metric, better = task.get("metric", "loss"), task.get("better")
    wanted = "higher" if metric == "accuracy" else "lower"
    if better in ("lower", "higher") and metric in ("loss", "perplexity", "accuracy") and better != wanted:
        yield Problem(("tasks", index, "better"), f"of `{metric}`, {wanted} is better; remove it.")


def _fidelities(data: _Data) -> tuple[str, ...]:
    value = data.get("fidelity", ("surrogate", "evaluated"))
    entries = [value] if isinstance(value, str) else value
    return tuple(str(entry) for entry in entries) if isinstance(entries, list | tuple) else ()


def _reference_problems(data: _Data) -> Iterator[Problem]:
    models = [entry.get("model") for _, entry in _mappings(data, "models")]
    tasks = [
        task.get("name") or _last_part(task.get("model") or (models[index] if index < len(models) else None))
        for index, task in _mappings(data, "tasks")
    ]
    for index, reference in _mappings(data, "references"):
        scores, weights = reference.get("scores"), reference.get("weights")
        yield from _scored_once(index, reference, evaluated="evaluated" in _fidelities(data))
        if isinstance(scores, Mapping) and scores and set(scores) != set(tasks):
            listing = one_of([str(task) for task in tasks], "and") if tasks else "none"
            message = f"has scores of {one_of(list(scores), 'and')}; the tasks are {listing}."
            yield Problem(("references", index, "scores"), message)
        if isinstance(weights, list | tuple) and models and len(weights) != len(models):
            message = f"{len(weights)} weights for {len(models)} models; expected one for each."
            yield Problem(("references", index, "weights"), message)
    design, budget = data.get("design"), data.get("budget")
    if isinstance(design, Mapping) and design.get("adaptive") is True:
        if not isinstance(budget, Mapping) or budget.get("points") is None:
            yield Problem(("budget", "points"), "missing; an adaptive design says how many mixes are evaluated.")
        if "evaluated" not in _fidelities(data):
            yield Problem(
                ("design", "adaptive"), "adapts to evaluated mixes; add `evaluated` to `fidelity`.", at_key=True
            )
    if "fitted" in _fidelities(data) and "evaluated" not in _fidelities(data):
        yield Problem(("fidelity",), "`fitted` is fitted to evaluated mixes; add `evaluated`.")


def _scored_once(index: int, reference: _Data, *, evaluated: bool) -> Iterator[Problem]:
    """What is wrong with where the scores of a reference come from."""
    scores, model = reference.get("scores"), reference.get("model")
    if not scores and model is None:
        yield Problem(("references", index), "has neither `scores`, one for every task, nor a `model` to evaluate.")
    if scores and model is not None:
        yield Problem(
            ("references", index, "scores"), "beside a `model` that is evaluated; keep one of them.", at_key=True
        )
    if model is not None and not evaluated:
        yield Problem(
            ("references", index, "model"),
            "is evaluated; add `evaluated` to `fidelity`, or give `scores`.",
            at_key=True,
        )


def _foreign(place: Place, name: str) -> str | None:
    if place == ("models",) and name == "weight":
        return "the weights of a preview come from its `design`; remove it."
    if place == ("output",) and name in ("precision", "max_shard_size"):
        return "a key of merges; write it into the recipe that `bayes-merge pick` makes."
    return None


_WORDING = Wording(
    PREVIEW_SPECS,
    required={
        "base_model": "name the base that the models were trained from.",
        "models": "list what is mixed, each `- model: ...`.",
        "model": "every entry names a model.",
        "merge_method": "name a method. `bayes-merge methods` lists them.",
        "tasks": "say what mixes are judged by, such as `tasks: [{name: code, data: code.jsonl}, ...]`.",
        "eval": "list what to evaluate on, each `- path: ...`.",
        "path": "name a file, a folder or a hub id.",
        "name": "every reference has a name.",
    },
    foreign=_foreign,
    stand_ins={"eval": frozenset({"path", "file", "files", "test", "validation"})},
)
