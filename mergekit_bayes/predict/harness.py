"""Tasks of lm-eval-harness on a model in memory (EleutherAI, https://github.com/EleutherAI/lm-evaluation-harness).

The harness, which is the extra `lm-eval`, writes prompts, asks the model and scores its answers; nothing of that is
done here. What is: tasks are loaded once for all models, code that a task would have a model write is never run, and
the harness neither speaks to the terminal nor disturbs the random numbers of others.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import math
import os
import random
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_bayes.checkpoint.files import listed, shown
from mergekit_bayes.errors import EvaluateError, PlanError
from mergekit_bayes.model.library import quiet, seeded
from mergekit_bayes.recipe.problem import did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from mergekit_bayes.recipe.harness import HarnessSpec

__all__ = ["EXTRA", "HarnessTask", "Metric", "TaskResult", "check_installed", "open_tasks"]

EXTRA = "pip install 'mergekit_bayes[lm-eval]'"
_SEED = 1234  # the harness' own


@dataclass(frozen=True)
class Metric:
    """One score.

    Attributes:
        value: in the unit of the metric.
        stderr: its standard error; None where the harness has none.
        higher_is_better: None where the task does not say.
    """

    value: float
    stderr: float | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskResult:
    """What a task found.

    Attributes:
        metrics: by the name of the metric (`acc`; with the filter behind it where there are several:
            `exact_match,strict-match`), by the name of the task and, of a group, those of its tasks.
        documents: that were evaluated.
    """

    metrics: Mapping[str, Mapping[str, Metric]]
    documents: int


@dataclass(frozen=True, eq=False)
class HarnessTask:
    """A task, a group or a tag with its documents, ready for one model after another.

    Attributes:
        name: as the harness knows it.
        spec: how it is asked.
        loaded: what the harness made of it.
    """

    name: str
    spec: HarnessSpec
    loaded: Mapping[str, Any] = field(repr=False)

    @property
    def documents(self) -> int:
        """How many are evaluated."""
        return sum(_limited(len(task.eval_docs), self.spec.limit) for task in self.loaded["tasks"].values())

    @cached_property
    def identity(self) -> Mapping[str, object]:
        """What scores depend on beside the model: the tasks as they are, their documents, the settings."""
        import lm_eval

        tasks = {name: [task.dump_config(), _documents(task)] for name, task in sorted(self.loaded["tasks"].items())}
        text = json.dumps(tasks, sort_keys=True, default=str)
        settings = {key: value for key, value in self.spec.plain().items() if key not in ("tasks", "include_path")}
        return {
            "task": self.name,
            "definition": hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
            "settings": settings,
            "version": getattr(lm_eval, "__version__", None),
        }

    def directions(self) -> dict[str, bool | None]:
        """Whether more is better, by metric in the order of the task; of a group, of all that its tasks have."""
        found: dict[str, bool | None] = {}
        for task in self.loaded["tasks"].values():
            found = dict(task.higher_is_better()) | found
        return found

    def run(self, model: nn.Module, tokenizer: Any, *, batch_size: int, title: str) -> TaskResult:
        """Evaluates a model at the weights that it has.

        Args:
            model: of transformers or PEFT, a language model, on its device.
            tokenizer: of the model.
            batch_size: requests in one forward pass, unless the settings say.
            title: how messages call the model.

        Raises:
            EvaluateError: the harness failed.
        """
        from lm_eval import evaluator

        spec = self.spec
        try:
            with _undisturbed():
                for task in self.loaded["tasks"].values():
                    task.set_fewshot_seed(seed=_SEED)
                found = evaluator.evaluate(
                    lm=_wrapped(model, tokenizer, spec, batch_size),
                    task_dict=self.loaded,
                    limit=spec.limit,
                    bootstrap_iters=spec.bootstrap_iters,
                    log_samples=False,
                    system_instruction=spec.system_instruction,
                    apply_chat_template=spec.apply_chat_template,
                    fewshot_as_multiturn=bool(spec.apply_chat_template) and spec.fewshot_as_multiturn,
                )
        except Exception as error:  # the harness and its tasks have no tree of their own
            raise EvaluateError(f"model {shown(title)}: lm_eval task {shown(self.name)}: {_told(error)}") from error
        directions = found["higher_is_better"]
        metrics = {name: dict(_metrics(own, directions.get(name, {}))) for name, own in found["results"].items()}
        return TaskResult({name: own for name, own in metrics.items() if own}, self.documents)


def open_tasks(spec: HarnessSpec, *, recipe_dir: Path | None = None) -> tuple[HarnessTask, ...]:
    """Loads tasks and their documents.

    Args:
        spec: which, and how they are asked.
        recipe_dir: folder that `include_path` is tried from after the current one.

    Raises:
        EvaluateError: the harness is not installed; there is no such task or folder; documents cannot be loaded.
        PlanError: several tasks that are not there, or cannot be loaded.
    """
    with _undisturbed():
        check_installed()
        from lm_eval.tasks import TaskManager  # takes seconds

        folder = None if spec.include_path is None else _folder(spec.include_path, recipe_dir)
        if folder is not None:
            with contextlib.suppress(PlanError):
                # indexing the harness' own tasks, some ten thousand, takes seconds
                return _all_loaded(TaskManager(include_path=folder, include_defaults=False), spec, folder)
        return _all_loaded(TaskManager(include_path=folder), spec, folder)


def check_installed() -> None:
    """Refuses to go on without the harness.

    Raises:
        EvaluateError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise EvaluateError(f"lm_eval: lm-evaluation-harness is not installed; {EXTRA} installs it")


def _folder(path: str, recipe_dir: Path | None) -> str:
    for place in (Path(path), (recipe_dir or Path()) / path):
        if place.is_dir():
            return str(place)
    raise EvaluateError(f"lm_eval.include_path: there is no folder {shown(path)}; expected one with task files (.yaml)")


def _all_loaded(manager: Any, spec: HarnessSpec, folder: str | None) -> tuple[HarnessTask, ...]:
    _check_names(spec, manager, folder)
    found, problems = [], []
    for name in spec.tasks:
        try:
            found.append(_loaded(manager, name, spec))
        except Exception as error:  # data sets, files and code of tasks fail in every way
            problems.append(EvaluateError(f"lm_eval task {shown(name)}: cannot be loaded: {_told(error)}"))
    if problems:
        raise PlanError(problems)
    return tuple(found)


def _check_names(spec: HarnessSpec, manager: Any, folder: str | None) -> None:
    known = manager.all_tasks
    problems = [
        EvaluateError(
            f"lm_eval: there is no task {shown(name)}.{did_you_mean(name, known)} `lm_eval ls tasks` lists those of "
            f"the harness{'' if folder is None else f'; {folder} has {_own(manager, folder)}'}"
        )
        for name in spec.tasks
        if name not in manager.task_index
    ]
    if problems:
        raise PlanError(problems)


def _own(manager: Any, folder: str) -> str:
    home = Path(folder).resolve()
    paths = {name: entry.yaml_path for name, entry in manager.task_index.items() if entry.yaml_path is not None}
    return listed(sorted(name for name, path in paths.items() if Path(path).resolve().is_relative_to(home))) or "none"


def _loaded(manager: Any, name: str, spec: HarnessSpec) -> HarnessTask:
    loaded = manager.load([name])
    for task in loaded["tasks"].values():
        default = task.get_config("num_fewshot")
        # as the harness has it: a task that says 0 is asked without examples
        if spec.num_fewshot is not None and default != 0:
            task.set_config(key="num_fewshot", value=spec.num_fewshot)
        elif default is None:
            task.set_config(key="num_fewshot", value=0)
        len(task.eval_docs)  # a task without documents to evaluate raises here
    return HarnessTask(name, spec, loaded)


def _wrapped(model: nn.Module, tokenizer: Any, spec: HarnessSpec, batch_size: int) -> Any:
    from lm_eval.models.huggingface import HFLM

    size = spec.batch_size or batch_size
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=spec.max_length)


def _metrics(found: Mapping[str, Any], directions: Mapping[str, bool | None]) -> Iterator[tuple[str, Metric]]:
    for key, value in found.items():
        name, comma, kind = key.partition(",")
        if not comma or name.endswith("_stderr") or isinstance(value, str | bool):
            continue
        stderr = found.get(f"{name}_stderr,{kind}")
        known = float(stderr) if isinstance(stderr, int | float | np.floating) else None
        title = name if kind == "none" else f"{name},{kind}"
        yield title, Metric(float(value), known, directions.get(name))


def _limited(count: int, limit: float | None) -> int:
    if limit is None:
        return count
    return min(count, math.ceil(count * limit) if limit < 1 else int(limit))


def _documents(task: Any) -> object:
    """What the documents of a task are known by: the fingerprints of its data sets."""
    parts = getattr(task, "dataset", None)
    if not isinstance(parts, Mapping):
        return [str(type(parts)), getattr(parts, "_fingerprint", None)]
    return {str(name): [len(part), getattr(part, "_fingerprint", None)] for name, part in parts.items()}


def _told(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {shown(lines[0])}" if lines else type(error).__name__


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """The harness without bars, messages, warnings and processes of its own, and with random numbers of its own."""
    logger, several = logging.getLogger("lm_eval"), os.environ.get("DISABLE_MULTIPROC")
    level, state, numbers = logger.level, random.getstate(), np.random.get_state()
    logger.setLevel(logging.CRITICAL)
    os.environ["DISABLE_MULTIPROC"] = "1"  # it would resample in one forked process for each core
    random.seed(_SEED)
    np.random.seed(_SEED)
    try:
        with (
            quiet(),
            seeded(_SEED),
            warnings.catch_warnings(action="ignore"),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            yield
    finally:
        logger.setLevel(level)
        random.setstate(state)
        np.random.set_state(numbers)
        if several is None:
            os.environ.pop("DISABLE_MULTIPROC", None)
        else:
            os.environ["DISABLE_MULTIPROC"] = several
