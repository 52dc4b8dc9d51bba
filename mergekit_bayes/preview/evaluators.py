"""Evaluating mixes of every method on one model in memory, by the fastest way the method and the sources allow."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import nn

from mergekit_bayes.merge.in_place import InPlace
from mergekit_bayes.merge.processes import Processes
from mergekit_bayes.model.base_identity import open_base
from mergekit_bayes.model.pretrained import Loading, load_pretrained
from mergekit_bayes.model.tokens import load_tokenizer
from mergekit_bayes.preview.design import Mix
from mergekit_bayes.preview.plans import MethodPlan
from mergekit_bayes.preview.stacked import StackedAdapters, can_stack
from mergekit_bayes.preview.tasks import (
    Scores,
    Sums,
    TaskData,
    batch_sums,
    check_fit,
    common_labels,
    load_tasks,
    scores_of_sums,
)
from mergekit_bayes.recipe.model import ModelSpec

if TYPE_CHECKING:
    from mergekit_bayes.data.read import Tables
    from mergekit_bayes.recipe.preview import PreviewRecipe

__all__ = ["Evaluated", "Evaluator", "Ground", "load_ground"]

Evaluator: TypeAlias = Callable[[nn.Module], float]
"""A score of your own for one task: the model in memory, in evaluation mode, to a number."""

_ALONE = Processes()


@dataclass(frozen=True)
class Evaluated:
    """What came of evaluating one mix.

    Attributes:
        scores: by task; empty where it failed.
        seconds: its share of the time.
        error: why it failed; None if it did not.
    """

    scores: Mapping[str, Scores]
    seconds: float
    error: str | None = None


@dataclass(frozen=True, eq=False)
class Ground:
    """What all evaluations share.

    Attributes:
        model: the base, in evaluation mode.
        tasks: with their rows.
        device: where the model is.
        dtype: what it computes in.
    """

    model: nn.Module
    tasks: tuple[TaskData, ...]
    device: torch.device
    dtype: torch.dtype


def load_ground(
    recipe: PreviewRecipe, *, recipe_dir: Path | None = None, tables: Tables | None = None, local_rank: int = 0
) -> Ground:
    """Loads the base and the data of all tasks.

    Args:
        recipe: of the preview.
        recipe_dir: folder that relative paths are tried from after the current directory.
        tables: data sets in memory, by the path that stands for them.
        local_rank: of this process on its machine, for its accelerator.

    Raises:
        MergekitBayesError: model or data cannot be read, or do not fit together.
    """
    spec = recipe.evaluation
    checkpoint, _ = open_base(recipe.base_model, recipe_dir=recipe_dir)
    tokenizer = load_tokenizer(checkpoint.folder, reference=recipe.base_model)
    rows = max(1, spec.batch_size // spec.mixes_per_batch)
    tasks = load_tasks(recipe, tokenizer, recipe_dir=recipe_dir, tables=tables, rows_per_batch=rows)
    device = _device(spec.device, local_rank)
    loading = Loading(
        spec=ModelSpec.model_construct(path=recipe.base_model, task=spec.task, dtype=spec.dtype),
        adapter=None,
        checkpoint=checkpoint,
        labels=common_labels(tasks),
        device=device,
        pad_token_id=0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        device_map=spec.device_map if isinstance(spec.device_map, str | None) else _devices(spec.device_map),
    )
    model, _ = load_pretrained(loading)
    check_fit(model, tasks, recipe.base_model)
    dtype = getattr(torch, spec.dtype)
    return Ground(model.eval().requires_grad_(False), tasks, device, dtype)


def _devices(asked: Mapping[str, str]) -> dict[str, str | int]:
    """A device for every part of a model; numbers are those of accelerators."""
    return {part: int(device) if device.isdigit() else device for part, device in asked.items()}


def _device(asked: str | None, local_rank: int) -> torch.device:
    if asked is not None:
        return torch.device(asked)
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


@dataclass(eq=False)
class Evaluations:
    """Evaluates mixes; keeps one method ready at a time, and is a context manager that leaves the model as it was.

    Attributes:
        ground: model and tasks.
        mixes_per_batch: mixes that share a forward pass where that is possible.
        max_memory: bytes of sources kept between merges.
        evaluators: scores of your own, by task; they see one model at a time.
    """

    ground: Ground
    mixes_per_batch: int
    max_memory: int
    evaluators: Mapping[str, Evaluator] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)
    _ready: tuple[MethodPlan, StackedAdapters | InPlace] | None = None
    _stacks: dict[str, bool] = field(default_factory=dict)

    def __enter__(self) -> Evaluations:
        return self

    def __exit__(self, *_: Any) -> None:
        self._leave()

    @property
    def splits_rows(self) -> bool:
        """Whether processes can share the rows of a mix: scores of your own look at a model as a whole."""
        return not self.evaluators

    def together(self, method: MethodPlan) -> int:
        """How many mixes of a method share a forward pass."""
        return self.mixes_per_batch if self._stackable(method) else 1

    def _stackable(self, method: MethodPlan) -> bool:
        if method.title not in self._stacks:
            self._leave()  # layers that are replaced just now are no linear layers
            self._stacks[method.title] = not self.evaluators and can_stack(method, self.ground.model)
        return self._stacks[method.title]

    def _leave(self) -> None:
        """The model as it was."""
        self._stack.close()
        self._ready = None

    def evaluate(self, method: MethodPlan, mixes: Sequence[Mix], processes: Processes = _ALONE) -> list[Evaluated]:
        """Evaluates mixes that share forward passes; what fails is recorded for the mix that made it fail.

        Args:
            method: of the mixes.
            mixes: not more than `together` says.
            processes: all of which call this, and split the rows of every task, where `splits_rows` says so; the scores
                are those of one process to the bit.
        """
        began, error = time.monotonic(), None
        found: dict[str, Sums | float] = {}
        try:
            found = self._found(method, mixes, (processes.rank, processes.count))
        except Exception as raised:  # one mix that fails must not end a sweep of hours
            error = f"{type(raised).__name__}: {raised}"
        shares = processes.gathered((found, error, time.monotonic() - began))
        seconds = sum(spent for _, _, spent in shares)
        failed = next((error for _, error, _ in shares if error is not None), None)
        if failed is None:
            scores = self._scores([parts for parts, _, _ in shares], len(mixes))
            return [Evaluated(each, seconds / len(mixes)) for each in scores]
        if len(mixes) > 1:
            return [alone for mix in mixes for alone in self.evaluate(method, [mix], processes)]
        return [Evaluated({}, seconds, failed)]

    def _found(self, method: MethodPlan, mixes: Sequence[Mix], share: tuple[int, int]) -> dict[str, Sums | float]:
        """What this process adds to the scores of every task."""
        ready, select = self._prepared(method), None
        if isinstance(ready, InPlace):
            (mix,) = mixes
            ready.load(method.steps_at(mix))
        else:
            select = partial(ready.choose, mixes)
        found: dict[str, Sums | float] = {}
        for task in self.ground.tasks:
            own = self.evaluators.get(task.name)
            if own is None:
                found[task.name] = batch_sums(self.ground.model, task, mixes=len(mixes), select=select, share=share)
            else:
                found[task.name] = float(own(self.ground.model))
        return found

    def _scores(self, shares: Sequence[Mapping[str, Sums | float]], count: int) -> list[dict[str, Scores]]:
        """The scores of every mix, from what all processes have."""
        found: list[dict[str, Scores]] = [{} for _ in range(count)]
        for task in self.ground.tasks:
            parts = [share[task.name] for share in shares]
            if task.name in self.evaluators:  # of one process and one mix
                found[0][task.name] = {task.metric: float(cast("float", parts[0]))}
                continue
            sums = {place: each for part in parts for place, each in cast("Sums", part).items()}
            for each, scores in zip(found, scores_of_sums(task, sums), strict=True):
                each[task.name] = scores
        return found

    def _prepared(self, method: MethodPlan) -> StackedAdapters | InPlace:
        """The method ready on the model; the one before leaves it."""
        if self._ready is not None and self._ready[0] is method:
            return self._ready[1]
        self._leave()
        ground = self.ground
        ready: StackedAdapters | InPlace
        if self._stackable(method):
            ready = StackedAdapters(ground.model, method, dtype=ground.dtype)
            self._stack.enter_context(ready.attached())
        else:
            merge = InPlace(ground.model, method.plan, title=method.title, max_memory=self.max_memory)
            ready = self._stack.enter_context(merge)
        self._ready = (method, ready)
        return ready
