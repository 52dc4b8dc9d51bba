"""How long a run is, and its learning rate: a function of the step alone, so that there is nothing to save."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from mergekit_bayes.errors import FinetuneError

__all__ = ["RunLength", "learning_rate", "run_length", "warmup_steps"]


@dataclass(frozen=True)
class RunLength:
    """Steps of a run.

    Attributes:
        steps: optimizer steps in all.
        steps_per_epoch: optimizer steps that see every row once; the last one may hold fewer rows.
    """

    steps: int
    steps_per_epoch: int

    @property
    def epochs(self) -> float:
        """Passes over the rows."""
        return self.steps / self.steps_per_epoch

    def epoch_of(self, step: int) -> float:
        """Passes over the rows that `step` steps make."""
        return step / self.steps_per_epoch


def run_length(*, rows: int, global_batch: int, num_train_epochs: float, max_steps: int) -> RunLength:
    """Returns the length of a run.

    Args:
        rows: rows of one epoch.
        global_batch: rows of one optimizer step, over all processes and micro-batches.
        num_train_epochs: passes over the rows; a fraction is rounded up to whole steps.
        max_steps: wins over the epochs if positive.

    Raises:
        FinetuneError: there is nothing to train on.
    """
    if rows < 1:
        raise FinetuneError("training data: no rows are left to train on; look at what was dropped and why")
    per_epoch = math.ceil(rows / global_batch)
    steps = max_steps if max_steps > 0 else math.ceil(num_train_epochs * per_epoch)
    return RunLength(max(steps, 1), per_epoch)


def warmup_steps(warmup: float, steps: int) -> int:
    """Returns steps of warm-up: a number below 1 is a share of the run, as in transformers."""
    return math.ceil(warmup * steps) if warmup < 1 else int(warmup)


def learning_rate(
    name: str, *, peak: float, warmup: float, steps: int, arguments: Mapping[str, object] | None = None
) -> Callable[[int], float]:
    """Returns the learning rate as a function of the steps already taken.

    Args:
        name: a schedule of `transformers.get_scheduler`, such as linear or cosine.
        peak: the rate after warm-up.
        warmup: steps, or a share of the run.
        steps: of the run.
        arguments: of the schedule, such as `min_lr_rate`.

    Raises:
        FinetuneError: an argument that this schedule does not take.
    """
    import torch
    from transformers import get_scheduler

    # the schedule is a factor on the rate of some optimizer; this one is never stepped
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=peak)
    try:
        schedule = get_scheduler(
            name,
            optimizer,
            num_warmup_steps=warmup_steps(warmup, steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=dict(arguments or {}),
        )
        factor = schedule.lr_lambdas[0]
        factor(0), factor(steps)
    except (TypeError, ValueError) as error:
        seen = f"training.lr_scheduler_kwargs: {dict(arguments or {})} does not fit lr_scheduler_type {name}: {error}"
        raise FinetuneError(seen) from error
    return lambda step: peak * float(factor(step))
