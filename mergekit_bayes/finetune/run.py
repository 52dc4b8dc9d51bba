"""From a fine-tuning recipe to a finished folder: model, sidecar, and everything a person wants to know about them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_bayes.checkpoint.output import OutputFolder
from mergekit_bayes.checkpoint.placement import resolve_target, work_folder
from mergekit_bayes.errors import RecipeError
from mergekit_bayes.finetune.choose import Beginning, choose_beginning
from mergekit_bayes.finetune.describe import describe, local_inputs
from mergekit_bayes.finetune.finish import finish_folder
from mergekit_bayes.finetune.interrupt import StopRequest, stop_on_signals
from mergekit_bayes.finetune.logbook import LOG_NAME, LogBook
from mergekit_bayes.finetune.loop import Counters, Loop
from mergekit_bayes.finetune.optimizers import take_course
from mergekit_bayes.finetune.progress import Progress, duration, follow
from mergekit_bayes.finetune.report import REPORT_NAME
from mergekit_bayes.finetune.saving import Saver
from mergekit_bayes.finetune.schedule import learning_rate
from mergekit_bayes.finetune.setup import Setup, check_engine, make_accelerator, prepare, without_cache
from mergekit_bayes.finetune.state import capture, restore
from mergekit_bayes.finetune.step import Stepper
from mergekit_bayes.finetune.trackers import Trackers
from mergekit_bayes.model import check_launch
from mergekit_bayes.recipe import load_recipe

if TYPE_CHECKING:
    from mergekit_bayes.data.read import Tables
    from mergekit_bayes.recipe.finetune import FinetuneRecipe

__all__ = ["FinetuneResult", "describe", "finetune"]

JOB = "finetune"
"""One job per output folder: what lies there is compared with the recipe, not thrown away for a typing error."""


@dataclass(frozen=True)
class FinetuneResult:
    """A finished run.

    Attributes:
        folder: the output, loadable by `from_pretrained`.
        report: the content of its report; empty in every process but the leading one.
    """

    folder: Path
    report: Mapping[str, Any]

    def summary(self) -> str:
        """What was trained and how well it does, for a terminal."""
        if not self.report:
            return ""
        report = self.report
        what = "LoRA adapter" if report["trained"]["adapter"] else "model"
        time_taken = duration(report["seconds"]["training"])
        lines = [f"{self.folder}: {what} trained for {report['length']['steps']} steps in {time_taken}"]
        for name, scores in report["evaluation"].items():
            lines.append(f"  {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in scores.items()))
        lines += [f"  note: {note}" for note in report["notes"]]
        return "\n".join(lines)


def finetune(
    recipe: FinetuneRecipe | Path | str | Mapping[str, Any],
    out: Path | str | None = None,
    *,
    overwrite: bool = False,
    progress: bool = False,
    recipe_dir: Path | None = None,
    tables: Tables | None = None,
) -> FinetuneResult:
    """Runs a fine-tuning recipe.

    The output folder appears when it is complete; until then everything is in `.<name>.partial` beside it. A run that
    was cut short, by Ctrl-C, `kill -9` or a full disk, is continued by the same call, from its newest whole checkpoint,
    and ends with the bytes of a run that was not. Under `torchrun` or `accelerate launch` every process calls this.

    The sidecar's N (`num_examples`) is the number of training units in the data, tokens that are predicted or examples:
    those of one epoch, or those seen if the run saw fewer.

    Args:
        recipe: path of a recipe, its content as a dictionary, or a loaded one.
        out: output folder; wins over the recipe's `output.path`.
        overwrite: replace an existing output folder, once the new one is complete.
        progress: show on standard error what happens: a bar on a terminal, else a line per row of the log.
        recipe_dir: folder that relative paths are tried from after the current one; by default the recipe's own.
        tables: data sets in memory (lists of mappings, or `datasets.Dataset`), by the path that stands for them in the
            recipe.

    Returns:
        The finished run.

    Raises:
        RecipeError: the recipe cannot be read; every problem at once.
        MergekitBayesError: model, data, disk or numbers did not allow it; nothing existing was touched.
        KeyboardInterrupt: Ctrl-C or SIGTERM; a checkpoint was written, and the message says how to continue.
    """
    loaded, folder = _loaded(recipe)
    places = recipe_dir if recipe_dir is not None else folder
    target = out if out is not None else loaded.output.path
    if target is None:
        hint = "missing; name a folder there, or after the recipe on the command line."
        raise RecipeError(loaded.describe(("output", "path"), hint))
    return _run(loaded, Path(target), _Options(overwrite, progress, places, tables))


def _loaded(recipe: FinetuneRecipe | Path | str | Mapping[str, Any]) -> tuple[FinetuneRecipe, Path | None]:
    from mergekit_bayes.recipe.finetune import FinetuneRecipe

    if isinstance(recipe, FinetuneRecipe):
        return recipe, recipe.folder
    found = load_recipe(recipe, expect=FinetuneRecipe)
    return found, found.folder


@dataclass(frozen=True)
class _Options:
    """Of a call, beside recipe and output."""

    overwrite: bool
    progress: bool
    recipe_dir: Path | None
    tables: Tables | None

    @property
    def places(self) -> list[Path]:
        """Folders that relative paths are tried from."""
        return [Path(), *([self.recipe_dir] if self.recipe_dir is not None else [])]


def _run(recipe: FinetuneRecipe, target: Path, options: _Options) -> FinetuneResult:
    began = time.monotonic()
    accelerator = make_accelerator(recipe.training, work_folder(resolve_target(target)) / "staging" / "trackers")
    check_launch()
    check_engine(accelerator)
    leader = accelerator.is_main_process
    inputs = local_inputs(recipe, options.recipe_dir)
    output = OutputFolder(target, overwrite=options.overwrite, inputs=inputs, job=JOB, leader=leader, precious=True)
    if leader:
        output.recover()
        output.check()
    with output, stop_on_signals() as stop:
        accelerator.wait_for_everyone()  # the leader has prepared the folder
        setup = prepare(recipe, accelerator, recipe_dir=options.recipe_dir, tables=options.tables)
        saver = Saver(output, recipe.training.save_total_limit)
        beginning = choose_beginning(
            recipe.training.resume_from_checkpoint, setup.identity, saver.folder, places=options.places
        )
        setup = setup.going_on(beginning.checkpoint)
        accelerator.wait_for_everyone()  # everybody has read what the leader may now delete
        if leader:
            _clear(saver, beginning)
        report = _train(setup, beginning, saver, stop, progress=options.progress and leader, began=began)
        if not leader:
            return FinetuneResult(target, {})
        output.publish()
    return FinetuneResult(target, report)


def _clear(saver: Saver, beginning: Beginning) -> None:
    kept = beginning.checkpoint.step if beginning.checkpoint is not None and beginning.own else -1
    saver.drop_after(kept)


def _train(
    setup: Setup, beginning: Beginning, saver: Saver, stop: StopRequest, *, progress: bool, began: float
) -> dict[str, Any]:
    recipe, accelerator, optimizer = setup.recipe, setup.accelerator, setup.optimizer
    model = setup.loaded.model
    wrapped = accelerator.prepare_model(model)
    counters, log_text = Counters(), ""
    if beginning.checkpoint is not None:
        counters = restore(beginning.checkpoint, setup.parameters, optimizer)
        take_course(optimizer, recipe.optimizer, beginning.changed("optimizer"))
        log_text = beginning.checkpoint.log
        if accelerator.scaler is not None and beginning.checkpoint.state["scaler"] is not None:
            accelerator.scaler.load_state_dict(beginning.checkpoint.state["scaler"])
    stepper = Stepper(
        accelerator,
        wrapped,
        optimizer,
        task=recipe.model.task,
        max_grad_norm=recipe.training.max_grad_norm,
        scaler=accelerator.scaler,
    )
    log_path = saver.output.staging / LOG_NAME if accelerator.is_main_process else None
    trackers = Trackers(accelerator, recipe.training.report_to)
    with (
        LogBook(log_path, log_text) as log,
        follow(show=progress, done=counters.step, total=setup.length.steps) as shown,
        without_cache(model),
    ):
        trackers.start(setup.identity.recipe, log.rows)
        _introduce(setup, beginning, shown)
        loop = Loop(
            training=recipe.training,
            accelerator=accelerator,
            model=model,
            stepper=stepper,
            feed=setup.feed,
            held_out=setup.data.eval,
            length=setup.length,
            rate=learning_rate(
                recipe.training.lr_scheduler_type,
                peak=recipe.optimizer.lr,
                warmup=recipe.training.warmup_steps,
                steps=setup.length.steps,
                arguments=recipe.training.lr_scheduler_kwargs,
            ),
            log=log,
            trackers=trackers,
            stop=stop,
            save=lambda: _save(setup, saver, counters, log),
            monitor=setup.monitor,
            counters=counters,
            progress=shown,
        )
        loop.run()
        loop.save()
        scores = loop.evaluate()
        trackers.finish()
    if not accelerator.is_main_process:
        return {}
    finish_folder(setup, saver.output.staging, counters, log.rows, scores, seconds=time.monotonic() - began)
    text = (saver.output.staging / REPORT_NAME).read_text(encoding="utf-8")
    return dict(json.loads(text))


def _save(setup: Setup, saver: Saver, counters: Counters, log: LogBook) -> str:
    path = saver.folder / f"checkpoint-{counters.step}"
    if setup.accelerator.is_main_process:
        scaler = setup.accelerator.scaler
        path = saver.save(
            lambda: capture(
                setup.identity,
                counters,
                setup.parameters,
                setup.optimizer,
                log=log.text,
                scaler=None if scaler is None else scaler.state_dict(),
            ),
            counters.step,
        )
    return str(path)


def _introduce(setup: Setup, beginning: Beginning, shown: Progress) -> None:
    for line in beginning.notes:
        shown.note(line)
    for line in setup.data.report.lines():
        shown.note(line)
    count = sum(parameter.numel() for parameter in setup.parameters.values())
    shown.note(f"{count:,} trainable parameters, {setup.length.steps:,} steps of {setup.feed.global_batch} rows")
    if setup.start is not None and beginning.checkpoint is None:
        shown.note(setup.start.line())
