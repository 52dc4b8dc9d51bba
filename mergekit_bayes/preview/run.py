"""From a preview recipe to the folder of its results."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_bayes.errors import RecipeError
from mergekit_bayes.finetune.interrupt import StopRequest, stop_on_signals
from mergekit_bayes.merge.processes import Processes
from mergekit_bayes.merge.schemas import method_schemas
from mergekit_bayes.preview.cache import EvaluationCache
from mergekit_bayes.preview.design import Mix
from mergekit_bayes.preview.designs import mixes_of
from mergekit_bayes.preview.folder import PreviewFolder
from mergekit_bayes.preview.harness import open_harness
from mergekit_bayes.preview.page import check_page
from mergekit_bayes.preview.plans import MethodPlan, curvature_plan, plan_methods, plan_references
from mergekit_bayes.preview.publish import Found, publish
from mergekit_bayes.preview.sweep import Group
from mergekit_bayes.recipe import load_recipe
from mergekit_bayes.recipe.preview import PreviewRecipe

if TYPE_CHECKING:
    from mergekit_bayes.data.read import Tables
    from mergekit_bayes.preview.evaluators import Evaluator
    from mergekit_bayes.preview.predict import Predictions

__all__ = ["PreviewResult", "preview"]


@dataclass(frozen=True)
class PreviewResult:
    """A finished preview.

    Attributes:
        folder: of the results.
        front: the content of its front.json; empty in every process but the leading one.
        text: what a terminal shows.
    """

    folder: Path
    front: Mapping[str, Any]
    text: str = ""

    def summary(self) -> str:
        """What was found, for a terminal."""
        return self.text


@dataclass(frozen=True)
class _Options:
    """Of a call, beside recipe and output."""

    progress: bool
    recipe_dir: Path | None
    tables: Tables | None
    evaluators: Mapping[str, Evaluator]


def preview(
    recipe: PreviewRecipe | Path | str | Mapping[str, Any],
    out: Path | str | None = None,
    *,
    overwrite: bool = False,
    progress: bool = False,
    recipe_dir: Path | None = None,
    tables: Tables | None = None,
    evaluators: Mapping[str, Evaluator] | None = None,
) -> PreviewResult:
    """Runs a preview recipe.

    Every evaluated mix is kept in the folder under a key of its inputs: the same call continues a sweep that was
    stopped, and a wider design evaluates what is new in it. Under `torchrun` or `accelerate launch` every process
    calls this; mixes are split over them, in the same groups as in one process.

    Args:
        recipe: path of a recipe, its content as a dictionary, or a loaded one.
        out: output folder; wins over the recipe's `output.path`.
        overwrite: evaluate everything anew.
        progress: show on standard error what happens.
        recipe_dir: folder that relative paths are tried from after the current one; by default the recipe's own.
        tables: data sets in memory, by the path that stands for them in the recipe.
        evaluators: scores of your own, by task, in place of those of the task's metric: the merged model in memory to a
            number. Such mixes are merged and evaluated one at a time, and so are those of tasks of lm-eval-harness.

    Returns:
        The results.

    Raises:
        RecipeError: the recipe cannot be read; every problem at once.
        PlanError: recipe and sources do not fit; every problem at once.
        MergekitBayesError: the base or the data cannot be read, the folder cannot be written.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what had been evaluated was written.
    """
    loaded = _loaded(recipe)
    target = out if out is not None else loaded.output.path
    if target is None:
        hint = "missing; name a folder there, or after the recipe on the command line."
        raise RecipeError(loaded.describe(("output", "path"), hint))
    places = loaded.folder if recipe_dir is None else recipe_dir
    _check_evaluators(loaded, evaluators or {})
    check_page(loaded)
    folder = PreviewFolder(Path(target), overwrite=overwrite)
    processes = Processes.from_environment()
    if processes.count > 1 and loaded.evaluation.device_map is not None:
        hint = f"spreads a model over the devices of one process, and there are {processes.count}; start one process."
        raise RecipeError(loaded.describe(("evaluation", "device_map"), hint))
    if processes.leader:
        folder.check()
    plans = plan_methods(loaded, places)
    plan_references(loaded, places)  # refused now, not after the posteriors have predicted
    loaded, of_harness = open_harness(loaded, places)
    options = _Options(progress, places, tables, {**of_harness, **(evaluators or {})})
    with ExitStack() as stack:
        stack.enter_context(processes.together())
        stack.enter_context(folder.held(loaded.resolved()) if processes.leader else nullcontext())
        stop = stack.enter_context(stop_on_signals())
        processes.barrier()  # the leader has prepared the folder
        return _Run(loaded, plans, folder, processes, options, stop).go()


def _loaded(recipe: PreviewRecipe | Path | str | Mapping[str, Any]) -> PreviewRecipe:
    if isinstance(recipe, PreviewRecipe):
        return recipe
    return load_recipe(recipe, expect=PreviewRecipe, methods=method_schemas())


def _check_evaluators(recipe: PreviewRecipe, evaluators: Mapping[str, Evaluator]) -> None:
    unknown = sorted(set(evaluators) - set(recipe.task_names))
    if unknown:
        raise RecipeError(f"evaluators: {unknown[0]} is no task; there are {', '.join(recipe.task_names)}")
    for name, task in zip(recipe.task_names, recipe.tasks, strict=True):
        if name in evaluators and task.lm_eval is not None:
            raise RecipeError(f"evaluators: {name} is a task of lm-eval-harness; keep one of the two")


@dataclass
class _Run:
    """One preview, from plans to files."""

    recipe: PreviewRecipe
    plans: Sequence[MethodPlan]
    folder: PreviewFolder
    processes: Processes
    options: _Options
    stop: StopRequest
    seconds: dict[str, float] = field(default_factory=dict)

    def go(self) -> PreviewResult:
        """Does everything, and writes what there is also when it is stopped."""
        mixes = mixes_of(self.recipe)
        predictions = self._predict(mixes) if self.processes.leader else None
        groups, units = self._evaluate(mixes)
        if not self.processes.leader:
            self._raise_if_stopped()
            return PreviewResult(self.folder.path, {})
        found = Found(
            recipe=self.recipe,
            plans=self.plans,
            mixes=mixes,
            groups=groups,
            records=EvaluationCache(self.folder.path).read() if groups else {},
            predictions=predictions,
            units=units,
            seconds=self.seconds,
            stopped=bool(self.stop),
        )
        front, text = publish(found, self.folder)
        self._raise_if_stopped()
        return PreviewResult(self.folder.path, front, text)

    def _raise_if_stopped(self) -> None:
        if self.stop:
            raise KeyboardInterrupt(
                f"interrupted; {self.folder.path} has the results so far, and the same command continues"
            )

    def _predict(self, mixes: Sequence[Mix]) -> Predictions | None:
        if "surrogate" not in self.recipe.fidelity:
            return None
        from mergekit_bayes.preview.predict import predict

        began = time.monotonic()
        dense = plan_methods(self.recipe, self.options.recipe_dir, space="full")
        curvature = curvature_plan(self.recipe, self.options.recipe_dir)
        found = predict(curvature, [(plan, mixes) for plan in dense])
        self.seconds["surrogate"] = time.monotonic() - began
        return found

    def _evaluate(self, mixes: Sequence[Mix]) -> tuple[list[Group], dict[str, int] | None]:
        """Groups with base and experts first, and units of every task; nothing where nothing is evaluated."""
        if "evaluated" not in self.recipe.fidelity:
            return [], None
        from mergekit_bayes.preview.evaluation import Evaluation

        began = time.monotonic()
        evaluation = Evaluation(
            self.recipe,
            self.plans,
            EvaluationCache(self.folder.path, rank=self.processes.rank),
            self.processes,
            recipe_dir=self.options.recipe_dir,
            tables=self.options.tables,
            evaluators=self.options.evaluators,
        )
        show = self.options.progress and self.processes.leader
        groups = evaluation.run(mixes, stopped=lambda: bool(self.stop), show=show)
        self.seconds["evaluation"] = time.monotonic() - began
        return groups, {task.name: task.units for task in evaluation.ground.tasks if task.units}
