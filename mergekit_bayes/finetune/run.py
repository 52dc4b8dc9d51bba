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
from mergekit_bayes.finetune.engine import check_engine, make_accelerator
from mergekit_bayes.finetune.finish import finish_folder, send_model
from mergekit_bayes.finetune.interrupt import stop_on_signals
from mergekit_bayes.finetune.progress import duration
from mergekit_bayes.finetune.report import REPORT_NAME
from mergekit_bayes.finetune.saving import Saver
from mergekit_bayes.finetune.setup import check_agreement, prepare
from mergekit_bayes.finetune.training import train
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
    check_engine(accelerator, recipe)
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
            recipe.training.resume_from_checkpoint,
            setup.identity,
            saver.folder,
            places=options.places,
            steps=setup.length.steps,
        )
        setup = setup.going_on(beginning.checkpoint)
        check_agreement(accelerator, setup.identity, 0 if beginning.checkpoint is None else beginning.checkpoint.step)
        accelerator.wait_for_everyone()  # everybody has read what the leader may now delete
        if leader:
            _clear(saver, beginning)
        trained = train(setup, beginning, saver, stop, show=options.progress and leader)
        if not leader:
            if setup.sharded:
                send_model(setup, output.staging)
            return FinetuneResult(target, {})
        finish_folder(setup, output.staging, trained, seconds=time.monotonic() - began)
        text = (output.staging / REPORT_NAME).read_text(encoding="utf-8")
        output.publish()
    return FinetuneResult(target, json.loads(text))


def _clear(saver: Saver, beginning: Beginning) -> None:
    kept = beginning.checkpoint.step if beginning.checkpoint is not None and beginning.own else -1
    saver.drop_after(kept)
