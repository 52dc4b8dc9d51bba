"""From a run that is set up to trained weights: take up what a checkpoint holds, train, score."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_bayes.finetune.checkpoints import Checkpoint, name_of, send_checkpoint
from mergekit_bayes.finetune.choose import Beginning
from mergekit_bayes.finetune.engine import any_of
from mergekit_bayes.finetune.interrupt import StopRequest
from mergekit_bayes.finetune.logbook import LOG_NAME, LogBook
from mergekit_bayes.finetune.loop import Counters, Loop
from mergekit_bayes.finetune.meter import Meter
from mergekit_bayes.finetune.optimizers import take_course
from mergekit_bayes.finetune.progress import Progress, follow
from mergekit_bayes.finetune.saving import Saver
from mergekit_bayes.finetune.schedule import learning_rate
from mergekit_bayes.finetune.setup import Setup, without_cache
from mergekit_bayes.finetune.state import capture, restore
from mergekit_bayes.finetune.step import Stepper
from mergekit_bayes.finetune.trackers import Trackers
from mergekit_bayes.model.environment import slow_dtype

if TYPE_CHECKING:
    from mergekit_bayes.recipe.finetune import FinetuneRecipe

__all__ = ["Trained", "train"]


@dataclass(frozen=True)
class Trained:
    """What training leaves behind beside the weights.

    Attributes:
        counters: how far it went.
        rows: of the log.
        scores: of the mean weights at the end, by data set.
    """

    counters: Counters
    rows: Sequence[Mapping[str, Any]]
    scores: Mapping[str, Mapping[str, float]]


def train(setup: Setup, beginning: Beginning, saver: Saver, stop: StopRequest, *, show: bool) -> Trained:
    """Trains from a beginning to the end of the run; the last state is a checkpoint.

    Args:
        setup: the run.
        beginning: where it begins.
        saver: keeps its checkpoints.
        stop: whether somebody wants it to end.
        show: progress on standard error.

    Raises:
        FinetuneError: too many steps in a row had no finite gradient.
        OutputError: the disk failed.
        KeyboardInterrupt: somebody wanted it to end; a checkpoint is there.
    """
    accelerator, model = setup.accelerator, setup.loaded.model
    wrapped = accelerator.prepare_model(model)
    meter = Meter(accelerator)
    counters, text = _take_up(setup, beginning, meter)
    path = saver.output.staging / LOG_NAME if accelerator.is_main_process else None
    trackers = Trackers(accelerator, setup.recipe.training.report_to)
    with (
        LogBook(path, text) as log,
        follow(show=show, done=counters.step, total=setup.length.steps) as shown,
        without_cache(model),
    ):
        trackers.start(setup.identity.recipe, log.rows)
        _introduce(setup, beginning, shown)
        loop = Loop(
            training=setup.recipe.training,
            accelerator=accelerator,
            model=model,
            stepper=_stepper(setup, wrapped),
            feed=setup.feed,
            held_out=setup.data.eval,
            length=setup.length,
            rate=_rate(setup.recipe, setup.length.steps),
            meter=meter,
            log=log,
            trackers=trackers,
            stop=stop,
            save=lambda: _save(setup, saver, counters, meter, log),
            monitor=setup.monitor,
            counters=counters,
            progress=shown,
        )
        loop.run()
        loop.save()
        scores = loop.evaluate()
        trackers.finish()
    return Trained(counters, log.rows, scores)


def _take_up(setup: Setup, beginning: Beginning, meter: Meter) -> tuple[Counters, str]:
    """Puts everything back that a checkpoint holds; returns how far the run was, and its log."""
    checkpoint = beginning.checkpoint
    if checkpoint is None:
        return Counters(), ""
    counters = restore(checkpoint, setup.parameters, setup.optimizer)
    take_course(setup.optimizer, setup.recipe.optimizer, beginning.changed("optimizer"))
    scaler = setup.accelerator.scaler
    if scaler is not None and checkpoint.state["scaler"] is not None:
        scaler.load_state_dict(checkpoint.state["scaler"])
    meter.take_up(checkpoint.state["meter"])
    return counters, checkpoint.log


def _stepper(setup: Setup, wrapped: Any) -> Stepper:
    return Stepper(
        setup.accelerator,
        wrapped,
        setup.optimizer,
        task=setup.recipe.model.task,
        max_grad_norm=setup.recipe.training.max_grad_norm,
        scaler=setup.accelerator.scaler,
    )


def _rate(recipe: FinetuneRecipe, steps: int) -> Callable[[int], float]:
    return learning_rate(
        recipe.training.lr_scheduler_type,
        peak=recipe.optimizer.lr,
        warmup=recipe.training.warmup_steps,
        steps=steps,
        arguments=recipe.training.lr_scheduler_kwargs,
    )


def _save(setup: Setup, saver: Saver, counters: Counters, meter: Meter, log: LogBook) -> str:
    pending = meter.pending()  # of all processes
    leader, scaler = setup.accelerator.is_main_process, setup.accelerator.scaler

    def state() -> Checkpoint:
        return capture(
            setup.identity,
            counters,
            setup.parameters,
            setup.optimizer,
            log=log.text,
            meter=pending,
            scaler=None if scaler is None else scaler.state_dict(),
        )

    # what is spread over the processes is written by one and read by all
    if setup.sharded and not any_of(setup.accelerator, leader and saver.has(counters.step)) and not leader:
        send_checkpoint(state())
    return str(saver.save(state, counters.step) if leader else saver.folder / name_of(counters.step))


def _introduce(setup: Setup, beginning: Beginning, shown: Progress) -> None:
    for line in (*beginning.notes, *setup.data.report.lines()):
        shown.note(line)
    count = sum(parameter.numel() for parameter in setup.parameters.values())
    shown.note(f"{count:,} trainable parameters, {setup.length.steps:,} steps of {setup.feed.global_batch} rows")
    if setup.start is not None and beginning.checkpoint is None:
        shown.note(setup.start.line())
    slow = _slow(setup)
    if slow is not None:
        shown.note(slow)


def _slow(setup: Setup) -> str | None:
    """What to change where the processor has to emulate what the model computes in."""
    import torch

    mixed = setup.accelerator.mixed_precision
    if mixed == "no":
        dtype = next(each.dtype for each in setup.loaded.model.parameters() if each.is_floating_point())
        change = "`model.dtype: float32`"
    else:
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[mixed]
        change = f"a run without `training.{mixed}`"
    found = slow_dtype(dtype, setup.accelerator.device)
    return None if found is None else f"{found}; {change} would take less time"
