"""The training loop: steps, and between them the log, evaluation, checkpoints, and wishes to stop."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from mergekit_bayes.errors import FinetuneError
from mergekit_bayes.finetune.engine import any_of
from mergekit_bayes.finetune.evaluation import evaluate
from mergekit_bayes.finetune.feed import Feed, StepData
from mergekit_bayes.finetune.interrupt import StopRequest
from mergekit_bayes.finetune.logbook import LogBook
from mergekit_bayes.finetune.meter import Meter
from mergekit_bayes.finetune.monitor import Monitor
from mergekit_bayes.finetune.progress import Progress
from mergekit_bayes.finetune.schedule import RunLength
from mergekit_bayes.finetune.seeding import seed_step
from mergekit_bayes.finetune.step import Stepper, StepResult
from mergekit_bayes.finetune.trackers import Trackers

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mergekit_bayes.data import Rows
    from mergekit_bayes.recipe.finetune import TrainingSpec

__all__ = ["Counters", "Loop"]

MOST_SKIPPED = 10
"""Steps in a row without a finite gradient after which a run gives up."""

MOST_SKIPPED_FP16 = 30
"""The same where the loss is scaled: the scale starts at 2^16 and halves at every overflow."""


@dataclass
class Counters:
    """How far a run is; what a checkpoint remembers beside weights and optimizer.

    Attributes:
        step: optimizer steps, skipped ones counted.
        units: training units seen, repetitions counted.
        tokens: tokens seen, prompts counted and padding not.
        seconds: spent on steps.
        skipped: steps without effect, because a gradient was not finite.
        skipped_in_a_row: those of them since the last good step.
    """

    step: int = 0
    units: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0


@dataclass
class Loop:
    """Everything a run needs while it trains.

    Attributes:
        training: the recipe's section.
        accelerator: device, precision, processes.
        model: without any wrapping; for evaluation.
        stepper: takes the steps.
        feed: training data.
        held_out: rows by the name of their data set.
        length: of the run.
        rate: learning rate by steps taken.
        meter: adds up what the next row of the log will say.
        log: where rows go.
        trackers: where they go too.
        stop: whether somebody wants the run to end.
        save: writes a checkpoint of the present step and returns its name.
        monitor: of IVON; None for other optimizers.
        counters: how far the run is.
        progress: what is shown.
    """

    training: TrainingSpec
    accelerator: Accelerator
    model: torch.nn.Module
    stepper: Stepper
    feed: Feed
    held_out: Mapping[str, Rows]
    length: RunLength
    rate: Callable[[int], float]
    meter: Meter
    log: LogBook
    trackers: Trackers
    stop: StopRequest
    save: Callable[[], str]
    monitor: Monitor | None = None
    counters: Counters = field(default_factory=Counters)
    progress: Progress = field(default_factory=Progress)

    def run(self) -> None:
        """Trains from where the counters stand to the end.

        Raises:
            FinetuneError: too many steps in a row had no finite gradient.
            OutputError: a checkpoint or the log could not be written.
            KeyboardInterrupt: a signal asked for it; a checkpoint is there.
        """
        counters, meter = self.counters, self.meter
        shown: dict[str, Any] = {}
        self.model.train()
        data = self.feed.steps(first=counters.step, steps_per_epoch=self.length.steps_per_epoch)
        while counters.step < self.length.steps:
            step_data = next(data)
            result = self._step(step_data)
            meter.add(result, step_data)
            self._check_skipped()
            pause = time.monotonic()
            if self._due(self.training.logging_steps):
                shown = self._log()
            self.progress.advance(counters.step, shown)
            if self._due(self.training.eval_steps) and counters.step < self.length.steps:
                self.evaluate()
            if self._due(self.training.save_steps):
                self.save()
            self._stop_if_asked()
            meter.pause(time.monotonic() - pause)

    def _step(self, data: StepData) -> StepResult:
        counters = self.counters
        seed_step(self.training.seed, counters.step, self.accelerator.process_index)
        result = self.stepper.step(data.micro_batches, units=data.units, lr=self.rate(counters.step))
        counters.step += 1
        if result.skipped:
            counters.skipped += 1
            counters.skipped_in_a_row += 1
        else:
            counters.units += data.units
            counters.skipped_in_a_row = 0
        return result

    def _due(self, every: int | None) -> bool:
        return every is not None and (self.counters.step % every == 0 or self.counters.step == self.length.steps)

    def _log(self) -> dict[str, Any]:
        counters = self.counters
        values, tokens, seconds = self.meter.read(steps_left=self.length.steps - counters.step)
        counters.tokens += tokens
        counters.seconds += seconds
        row: dict[str, Any] = {
            "step": counters.step,
            "epoch": round(self.length.epoch_of(counters.step), 6),
            "learning_rate": self.rate(counters.step - 1),
            **values,
        }
        if self.monitor is not None and counters.step > counters.skipped:
            row["ivon"] = self.monitor.measure()
        self._record(row)
        return row

    def _record(self, row: Mapping[str, Any]) -> None:
        self.log.add(row)
        self.trackers.log(row)
        self.progress.log(self.counters.step, row)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Scores the mean weights on every held-out data set, and puts the scores into the log."""
        scores = {
            name: evaluate(
                self.model,
                rows,
                pad_token_id=self.feed.pad_token_id,
                batch_size=self.training.per_device_eval_batch_size,
                accelerator=self.accelerator,
                flatten=self.feed.flatten,
            )
            for name, rows in self.held_out.items()
        }
        if scores:
            epoch = round(self.length.epoch_of(self.counters.step), 6)
            self._record({"step": self.counters.step, "epoch": epoch, "eval": scores})
        return scores

    def _check_skipped(self) -> None:
        most = MOST_SKIPPED_FP16 if self.training.fp16 else MOST_SKIPPED
        counters = self.counters
        if counters.skipped_in_a_row < most:
            return
        good = counters.step - counters.skipped_in_a_row
        seen = f"training: the gradients of steps {good + 1} to {counters.step} were not finite; expected finite ones"
        if not good:
            raise FinetuneError(f"{seen}; nothing was learned yet: lower optimizer.lr, or look at data and model dtype")
        counters.step, counters.skipped_in_a_row = good, 0
        kept = self.save()
        raise FinetuneError(
            f"{seen}; the weights after step {good} are kept in {kept}: go on from it with a lower optimizer.lr "
            f"and `--set training.resume_from_checkpoint={kept}`"
        )

    def _stop_if_asked(self) -> None:
        if not self._asked():
            return
        kept = self.save()
        done = f"stopped by {self.stop.signal or 'a signal'} after step {self.counters.step} of {self.length.steps}"
        raise KeyboardInterrupt(f"{done}; {kept} is saved, and the same command continues from it")

    def _asked(self) -> bool:
        """Whether any process was asked: all must stop at the same step."""
        return any_of(self.accelerator, bool(self.stop))
