"""After the last step: model, sidecar, recipe, picture, report and card, in the folder that will be published."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_bayes.checkpoint.disk import write_atomically
from mergekit_bayes.finetune.card import model_card
from mergekit_bayes.finetune.curve import draw_curve
from mergekit_bayes.finetune.ivon import IVON, Diagnostics, diagnose, export_precision
from mergekit_bayes.finetune.ivon.sharding import drop_gathered, whole
from mergekit_bayes.finetune.monitor import curvature_warning
from mergekit_bayes.finetune.report import REPORT_NAME, peak_memory, report_text, versions
from mergekit_bayes.model import save_trained, write_precision
from mergekit_bayes.recipe import dump_yaml

if TYPE_CHECKING:
    from mergekit_bayes.finetune.loop import Counters
    from mergekit_bayes.finetune.setup import Setup
    from mergekit_bayes.finetune.training import Trained

__all__ = ["RECIPE_NAME", "finish_folder", "send_model"]

RECIPE_NAME = "finetune_recipe.yaml"
CURVE_NAME = "loss.png"


def finish_folder(setup: Setup, folder: Path, trained: Trained, *, seconds: float) -> None:
    """Writes everything but log and checkpoints.

    Where the model is spread over processes, the others call `send_model` meanwhile.

    Args:
        setup: the run.
        folder: where to.
        trained: how it went.
        seconds: since the call that runs now began.

    Raises:
        OutputError: the disk failed.
        NumericalError: a precision that none can be.
    """
    recipe = setup.recipe
    _save_model(setup, folder, write=True)
    found = _diagnose(setup)
    precision = None if found is None else _write_precision(setup, folder, trained.counters, found)
    _write(folder / RECIPE_NAME, dump_yaml(recipe.resolved()))
    draw_curve(folder / CURVE_NAME, trained.rows, unit=_unit(setup))
    content = _report(setup, trained, precision, seconds)
    _write(folder / REPORT_NAME, report_text(content))
    _write(folder / "README.md", model_card(content))


def send_model(setup: Setup, folder: Path) -> None:
    """Gives this process's parts of a model and its curvature to the one that writes them.

    Args:
        setup: the run.
        folder: where that one writes.
    """
    _save_model(setup, folder, write=False)
    if _diagnose(setup) is not None:
        for parameter in setup.parameters.values():
            whole(setup.optimizer.state[parameter]["hess"])


def _save_model(setup: Setup, folder: Path, *, write: bool) -> None:
    if setup.sharded:
        drop_gathered(setup.loaded.model)
    save_trained(setup.loaded.model, setup.loaded.tokenizer, folder, base=setup.loaded.base, write=write)


def _diagnose(setup: Setup) -> Diagnostics | None:
    """Where IVON stands; None if there will be no sidecar."""
    if setup.recipe.output.precision is False or not isinstance(setup.optimizer, IVON):
        return None
    return diagnose(setup.optimizer)


def _unit(setup: Setup) -> str:
    return "token" if setup.recipe.model.task == "causal_lm" else "example"


def num_examples(setup: Setup, counters: Counters) -> int:
    """Returns N of the sidecar: units of one epoch, or those seen if the run saw fewer."""
    return max(1, min(setup.data.train.num_units, counters.units))


def _write_precision(setup: Setup, folder: Path, counters: Counters, found: Diagnostics) -> dict[str, Any]:
    """Writes the sidecar of an IVON run, and returns what the report says about it."""
    output, optimizer = setup.recipe.output, setup.optimizer
    assert isinstance(optimizer, IVON)  # nothing else was diagnosed
    assert output.precision is not False
    units_per_step = max(1, round(counters.units / max(1, counters.step - counters.skipped)))
    exported = export_precision(
        optimizer,
        setup.parameters.items(),
        num_examples=num_examples(setup, counters),
        debias=output.debias_precision,
        units_per_step=units_per_step,
    )
    write_precision(
        folder,
        exported,
        base=setup.loaded.base,
        loss_unit=_unit(setup),
        batch_size=units_per_step,
        dtype=output.precision,
    )
    weights = sum(parameter.numel() for parameter in setup.parameters.values())
    return {
        "num_examples": num_examples(setup, counters),
        "debiased": output.debias_precision,
        "floored": exported.floored / weights,
        "moved": found.moved,
        "clipped": found.clipped,
        "noise_to_weight": found.noise_to_weight,
        "hess_init_share": found.hess_init_share,
        "lowest_precision": found.lowest_precision,
        "warning": curvature_warning(moved=found.moved, floored=exported.floored / weights),
    }


def _report(setup: Setup, trained: Trained, precision: Mapping[str, Any] | None, seconds: float) -> dict[str, Any]:
    recipe, base, length, counters = setup.recipe, setup.loaded.base, setup.length, trained.counters
    notes = [precision["warning"]] if precision is not None and precision["warning"] else []
    if counters.skipped:
        notes.append(f"{counters.skipped} of {counters.step} steps were skipped: their gradients were not finite.")
    return {
        "task": recipe.model.task,
        "recipe": recipe.resolved(),
        "base": {"path": base.path, "revision": base.revision, "fingerprint": base.fingerprint},
        "trained": {
            "adapter": recipe.adapter is not None,
            "parameters": sum(parameter.numel() for parameter in setup.parameters.values()),
            "tensors": len(setup.parameters),
        },
        "length": {
            "steps": counters.step,
            "skipped": counters.skipped,
            "epochs": length.epoch_of(counters.step),
            "global_batch": setup.feed.global_batch,
            "processes": setup.accelerator.num_processes,
        },
        "units": {
            "unit": _unit(setup),
            "rows": len(setup.data.train),
            "in_data": setup.data.train.num_units,
            "seen": counters.units,
            "tokens": counters.tokens,
        },
        "data": {"fingerprint": setup.data.train.fingerprint, "report": setup.data.report.plain()},
        "optimizer": {
            "name": recipe.optimizer.name,
            "start": None if setup.start is None else dict(setup.identity.start),
        },
        "precision": None if precision is None else dict(precision),
        "evaluation": {name: dict(values) for name, values in trained.scores.items()},
        "seconds": {"training": counters.seconds, "this_call": seconds},
        "tokens_per_second": counters.tokens / counters.seconds if counters.seconds else None,
        "peak_memory": peak_memory(),
        "device": str(setup.accelerator.device),
        "seeds": {"seed": recipe.training.seed, "data_seed": setup.feed.seed},
        "notes": notes,
        "versions": versions(),
    }


def _write(path: Path, text: str) -> None:
    write_atomically(path, text.encode())
