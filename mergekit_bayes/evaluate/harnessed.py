"""What lm-eval-harness says of the models of an evaluation: task by task, known again after a stop."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from mergekit_bayes.data import Task
from mergekit_bayes.errors import EvaluateError
from mergekit_bayes.evaluate.open_model import OpenModel
from mergekit_bayes.evaluate.processes import gathered
from mergekit_bayes.evaluate.progress import Advance
from mergekit_bayes.evaluate.store import Store, key_of
from mergekit_bayes.predict.harness import HarnessTask, open_tasks
from mergekit_bayes.recipe.evaluate import EvaluateRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["Answers", "Harnessed", "harness_results", "open_harness"]

Answers: TypeAlias = Mapping[str, Mapping[str, Any]]
"""A `TaskResult` as plain data, by the name of the task."""


@dataclass(frozen=True)
class Harnessed:
    """The tasks of an evaluation.

    Attributes:
        recipe: what was asked for.
        tasks: with their documents; none where no harness is asked.
        store: what is known.
        accelerator: device and processes.
    """

    recipe: EvaluateRecipe
    tasks: Sequence[HarnessTask]
    store: Store
    accelerator: Accelerator

    @property
    def documents(self) -> int:
        """How many a model is asked about."""
        return sum(task.documents for task in self.tasks)

    def answers(self, model: OpenModel, advance: Advance) -> Answers:
        """Evaluates a model at its mean; every process takes its share of the tasks and knows the rest."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        found: dict[str, Mapping[str, Any]] = {}
        for number, task in enumerate(self.tasks):
            advance(f"{model.candidate.title}: {task.name}", 0)
            if number % world == rank:
                found[task.name] = self._answer(model, task)
            advance(f"{model.candidate.title}: {task.name}", task.documents)
        shares = gathered(self.accelerator, found)
        whole = {name: answer for share in shares for name, answer in share.items()}
        return {task.name: whole[task.name] for task in self.tasks}

    def key(self, model: OpenModel, task: HarnessTask) -> str:
        """Of what the scores of a model on a task depend on."""
        own = {"dtype": self.recipe.dtype, "batch_size": self.recipe.batch_size}
        return f"{key_of({**model.candidate.identity, **task.identity, **own})}:lm_eval"

    def _answer(self, model: OpenModel, task: HarnessTask) -> Mapping[str, Any]:
        item = self.key(model, task)
        record = self.store.get(item)
        if record is None:
            record = asdict(model.harnessed(task)) | {"item": item}
            self.store.put(item, record)
        return record


def open_harness(recipe: EvaluateRecipe, task: Task, recipe_dir: Path | None) -> tuple[HarnessTask, ...]:
    """Loads the tasks that a recipe names, if any.

    Raises:
        EvaluateError: the models are no language models; the harness is not installed; a task cannot be loaded.
        PlanError: several tasks that cannot be loaded.
    """
    if recipe.lm_eval is None:
        return ()
    if task == "sequence_classification":
        raise EvaluateError(
            f"lm_eval: tasks of the harness are put to language models, and these are models for {task}; expected "
            "language models, or `data` alone"
        )
    return open_tasks(recipe.lm_eval, recipe_dir=recipe_dir)


def harness_results(tasks: Sequence[HarnessTask], found: Mapping[str, Answers]) -> dict[str, Any]:
    """What `results.json` says of the harness; nothing where it was not asked.

    Args:
        tasks: in the order of the recipe.
        found: by the title of the model.
    """
    if not tasks:
        return {}
    scores = {
        title: {name: metrics for answer in answers.values() for name, metrics in answer["metrics"].items()}
        for title, answers in found.items()
    }
    first = next(iter(found.values()))
    about = {name: {"documents": answer["documents"]} for name, answer in first.items()}
    return {"lm_eval": scores, "lm_eval_tasks": about, "lm_eval_version": tasks[0].identity["version"]}


def answer_lines(found: Mapping[str, Answers]) -> Iterator[str]:
    """Lines of JSON that `Store` reads back, one for each model and task."""
    for title, answers in found.items():
        for name, answer in answers.items():
            yield json.dumps({"model": title, "task": name, **answer}, sort_keys=True)
