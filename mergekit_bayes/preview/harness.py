"""Tasks of lm-eval-harness as evaluators of a preview: the merged model in memory to one metric of one task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from mergekit_bayes.checkpoint.files import listed, shown
from mergekit_bayes.errors import EvaluateError, MergekitBayesError, PlanError, RecipeError
from mergekit_bayes.merge.inputs import flatten
from mergekit_bayes.model.base_identity import open_base
from mergekit_bayes.model.tokens import load_tokenizer
from mergekit_bayes.predict.harness import HarnessTask, open_tasks
from mergekit_bayes.recipe.preview import FIRST_METRIC, PreviewRecipe, TaskSpec

__all__ = ["HarnessEvaluator", "open_harness"]

_PREFERRED = "acc"


@dataclass(frozen=True, eq=False)
class HarnessEvaluator:
    """Puts models to a task.

    Attributes:
        name: what the preview calls the task.
        task: with its documents.
        metric: which score.
        base_model: reference of the base, whose tokenizer all mixes have.
        batch_size: requests in one forward pass, unless the task's settings say.
        recipe_dir: where relative paths may start beside the current directory.
    """

    name: str
    task: HarnessTask
    metric: str
    base_model: str
    batch_size: int
    recipe_dir: Path | None

    def __call__(self, model: nn.Module) -> float:
        """The score of a model.

        Raises:
            EvaluateError: the harness failed, or has no such score.
        """
        found = self.task.run(model, self._tokenizer, batch_size=self.batch_size, title=f"mix on {self.name}")
        own = found.metrics.get(self.task.name)
        if own is None:
            raise EvaluateError(
                f"task {self.name}: {shown(self.task.name)} has no score of its own; name one of "
                f"{listed([*found.metrics])}"
            )
        chosen = next((key for key in own if key == self.metric or key.startswith(f"{self.metric},")), None)
        if chosen is None:
            raise EvaluateError(f"task {self.name}: no metric {shown(self.metric)}; there are {listed([*own])}")
        return own[chosen].value

    @cached_property
    def identity(self) -> str:
        """Digest of everything that decides the score of a model."""
        text = json.dumps([self.task.identity, self.metric, self.batch_size], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    @cached_property
    def _tokenizer(self) -> Any:
        checkpoint, _ = open_base(self.base_model, recipe_dir=self.recipe_dir)
        return load_tokenizer(checkpoint.folder, reference=self.base_model)


def open_harness(
    recipe: PreviewRecipe, recipe_dir: Path | None = None
) -> tuple[PreviewRecipe, dict[str, HarnessEvaluator]]:
    """Loads the tasks of a preview that are those of the harness.

    Args:
        recipe: of the preview.
        recipe_dir: folder that relative paths are tried from after the current directory; by default the recipe's.

    Returns:
        The recipe with the metrics of those tasks, and which way they are better, filled in; the evaluators by task.
        Nothing is loaded where nothing is evaluated.

    Raises:
        PlanError: tasks that cannot be loaded, or have no such metric; every problem at once.
    """
    if "evaluated" not in recipe.fidelity:
        return recipe, {}
    folder = recipe.folder if recipe_dir is None else recipe_dir
    tasks, found, problems = list(recipe.tasks), dict[str, HarnessEvaluator](), list[MergekitBayesError]()
    for index, (name, spec) in enumerate(zip(recipe.task_names, recipe.tasks, strict=True)):
        if spec.lm_eval is None:
            continue
        try:
            (task,) = open_tasks(spec.lm_eval, recipe_dir=folder)
            tasks[index] = _settled(recipe, index, spec, task.directions())
        except MergekitBayesError as error:
            problems += [type(each)(f"task {name}: {each}") for each in flatten(error)]
            continue
        size = recipe.evaluation.batch_size
        found[name] = HarnessEvaluator(name, task, tasks[index].metric, recipe.base_model, size, folder)
    if problems:
        raise PlanError(problems)
    return recipe.model_copy(update={"tasks": tuple(tasks)}), found


def _settled(recipe: PreviewRecipe, index: int, spec: TaskSpec, known: Mapping[str, bool | None]) -> TaskSpec:
    """The task with its metric and its direction."""
    metric = spec.metric
    if metric == FIRST_METRIC:
        metric = _PREFERRED if _PREFERRED in known else next(iter(known))
    plain = metric.partition(",")[0]
    if plain not in known:
        message = f"{shown(metric)} is none of {listed([*known])}."
        raise RecipeError(recipe.describe(("tasks", index, "metric"), message))
    higher = known[plain]
    if spec.better is None and higher is None:
        message = f"missing; the task does not say whether more {shown(metric)} is better. Write lower or higher."
        raise RecipeError(recipe.describe(("tasks", index, "better"), message))
    return spec.model_copy(update={"metric": metric, "better": spec.better or ("higher" if higher else "lower")})
