"""The tasks of a preview in memory: rows tokenised and batched once, and what a model scores on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from torch import Tensor, nn

from mergekit_bayes.data import misfit, packing_fault
from mergekit_bayes.errors import EvaluateError
from mergekit_bayes.model.load import longest_row
from mergekit_bayes.predict import predict_next_tokens, predict_probabilities
from mergekit_bayes.predict.rows import Feed, read_rows, spread

if TYPE_CHECKING:
    from mergekit_bayes.data.read import Tables
    from mergekit_bayes.recipe.preview import PreviewRecipe, TaskSpec

__all__ = ["Scores", "Sums", "TaskData", "batch_sums", "common_labels", "load_tasks", "score", "scores_of_sums"]

Scores: TypeAlias = Mapping[str, float]
"""Every score of one task by its name: `loss` in nats per unit, `perplexity`, `accuracy`."""

Sums: TypeAlias = Mapping[int, Sequence[tuple[float, float]]]
"""By batch, for each mix: summed loss and number of right answers."""

Select: TypeAlias = Callable[[int], None]
"""Told how many rows of every mix the next batch holds."""


@dataclass(frozen=True, eq=False)
class TaskData:
    """One task.

    Attributes:
        name: what plots and tables call it.
        metric: the score that it is judged by.
        batches: what models take, with `labels`; long rows first.
        task: `causal_lm` or `sequence_classification`.
        labels: names of the classes; None for language models.
        units: tokens or examples that are scored.
        key: digest of everything that decides the score of a model.
        packed: whether rows hold several segments.
        largest_token: the highest token id.
        longest: tokens of the longest row.
    """

    name: str
    metric: str
    batches: tuple[dict[str, Tensor], ...]
    task: str
    labels: tuple[str, ...] | None
    units: int
    key: str
    packed: bool
    largest_token: int
    longest: int


def load_tasks(
    recipe: PreviewRecipe,
    tokenizer: Any,
    *,
    recipe_dir: Path | None = None,
    tables: Tables | None = None,
    rows_per_batch: int,
) -> tuple[TaskData, ...]:
    """Reads the data of all tasks.

    Args:
        recipe: of the preview.
        tokenizer: of the base.
        recipe_dir: folder that relative paths are tried from after the current directory.
        tables: data sets in memory, by the path that stands for them.
        rows_per_batch: rows of one mix in a forward pass.

    Raises:
        DataError: data that cannot be read, or classes that differ between tasks.
    """
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    found = []
    for spec, name in zip(recipe.tasks, recipe.task_names, strict=True):
        if spec.lm_eval is not None:
            found.append(_without_rows(spec, name))
            continue
        assert spec.data is not None  # the check of the recipe wants data where something is evaluated
        data = read_rows(
            spec.data,
            tokenizer,
            task=recipe.evaluation.task,
            labels=spec.data.labels,
            recipe_dir=recipe_dir,
            tables=tables,
        )
        feed = Feed(spread(data.train, spec.max_rows), rows_per_batch, pad)
        found.append(_task(spec, name, feed, data.labels))
    common_labels(found)
    return tuple(found)


def _task(spec: TaskSpec, name: str, feed: Feed, labels: tuple[str, ...] | None) -> TaskData:
    rows = feed.rows
    return TaskData(
        name=name,
        metric=spec.metric,
        batches=tuple(feed.batch(indices) for indices in feed.batches),
        task=rows.task,
        labels=labels,
        units=int(rows.units.sum()),
        key=f"{rows.fingerprint}:{spec.metric}:{labels}",
        packed=rows.packed,
        largest_token=rows.largest_token,
        longest=int(rows.lengths.max(initial=0)),
    )


def _without_rows(spec: TaskSpec, name: str) -> TaskData:
    """A task whose documents are those of an evaluator."""
    return TaskData(
        name=name,
        metric=spec.metric,
        batches=(),
        task="causal_lm",
        labels=None,
        units=0,
        key="",
        packed=False,
        largest_token=0,
        longest=0,
    )


def common_labels(tasks: Sequence[TaskData]) -> tuple[str, ...]:
    """The classes of all tasks, which one head predicts; empty for language models.

    Raises:
        EvaluateError: they differ.
    """
    first = tasks[0]
    for other in tasks[1:]:
        if other.labels != first.labels:
            raise EvaluateError(
                f"tasks: {first.name} has the labels {first.labels}, {other.name} {other.labels}; one merged head "
                "predicts the same classes for all of them: set `data.labels` alike"
            )
    return first.labels or ()


def check_fit(model: Any, tasks: Sequence[TaskData], name: str) -> None:
    """Refuses rows that a model has no place for, or packed ones whose segments would see each other.

    Args:
        model: of transformers.
        tasks: what it will be scored on.
        name: how messages call the model.

    Raises:
        EvaluateError: a token beyond the vocabulary, a row beyond the last position, or packed rows that it mixes.
    """
    vocabulary, positions = int(model.get_input_embeddings().weight.shape[0]), longest_row(model)
    for task in tasks:
        fault = misfit(
            name,
            largest_token=task.largest_token,
            longest=task.longest,
            vocabulary=vocabulary,
            longest_row=positions,
        )
        if fault is not None:
            raise EvaluateError(f"task {task.name}: {fault}")
    packed = [task for task in tasks if task.packed]
    if packed:
        fault = packing_fault(model, vocabulary=max(task.largest_token for task in packed) + 1)
        if fault is not None:
            raise EvaluateError(f"tasks: data.packing: this model cannot be evaluated on packed rows: {fault}")


def score(model: nn.Module, task: TaskData, *, mixes: int = 1, select: Select | None = None) -> list[Scores]:
    """Scores a model, or several mixes that it computes side by side; see `batch_sums` and `scores_of_sums`."""
    return scores_of_sums(task, batch_sums(model, task, mixes=mixes, select=select))


def batch_sums(
    model: nn.Module,
    task: TaskData,
    *,
    mixes: int = 1,
    select: Select | None = None,
    share: tuple[int, int] = (0, 1),
) -> Sums:
    """What every batch adds to the scores of a model, or of several mixes that it computes side by side.

    Args:
        model: gives logits; of rows repeated for every mix, one mix after the other, where there are several.
        task: what it is scored on.
        mixes: how many.
        select: called before every batch with its number of rows.
        share: this process and the number of all; each takes every so-many-th batch.

    Returns:
        For each mix the summed loss and the number of right answers, by batch.

    Raises:
        EvaluateError: outputs that are no logits.
        NonFiniteError: the model computed NaN.
    """
    rank, world = share
    found: dict[int, list[tuple[float, float]]] = {}
    for place in range(rank, len(task.batches), world):
        batch = task.batches[place]
        repeated = {name: tensor.repeat(mixes, *[1] * (tensor.dim() - 1)) for name, tensor in batch.items()}
        if select is not None:
            select(len(batch["labels"]))
        loss, correct = _scored(model, task, repeated)
        losses = loss.view(mixes, -1).sum(dim=1).tolist()
        right = [0.0] * mixes if correct is None else correct.double().view(mixes, -1).sum(dim=1).tolist()
        found[place] = list(zip(losses, right, strict=True))
    return found


def scores_of_sums(task: TaskData, sums: Sums) -> list[Scores]:
    """The scores of every mix, added up batch by batch in order: whoever computed them, they are the same to the bit.

    Args:
        task: what was scored.
        sums: of all of its batches.
    """
    totals = np.zeros_like(np.array(sums[0], dtype=np.float64))
    for place in range(len(task.batches)):
        totals += np.array(sums[place], dtype=np.float64)
    return [_named(task, loss, accuracy) for loss, accuracy in (totals / task.units).tolist()]


def _scored(model: nn.Module, task: TaskData, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Loss of every unit of a batch, mix by mix, and whether the most probable answer was right."""
    if task.task == "causal_lm":
        tokens = predict_next_tokens(model, [batch], vocabulary=task.metric == "accuracy")
        return tokens.nll, None if tokens.vocabulary is None else tokens.vocabulary.correct
    classes = predict_probabilities(model, [batch])
    return classes.nll, classes.correct


def _named(task: TaskData, loss: float, accuracy: float) -> Scores:
    found = {"loss": loss}
    if task.task == "causal_lm":
        found["perplexity"] = math.exp(min(loss, 700.0))
    if task.task != "causal_lm" or task.metric == "accuracy":
        found["accuracy"] = accuracy
    return found
