"""Fine-tuning that leaves a posterior behind: recipe -> model, data, optimizer -> steps -> a published folder.

    ivon/                           the optimizer: samples weights, keeps a mean and a curvature; export to precisions
    setup.py, optimizers.py         everything a run consists of; starting values that the recipe leaves open
    engine.py                       devices and processes; a whole model in each, or one in shards
    feed.py, step.py, loss.py       rows of one step; its gradient, whole or in micro-batches; units of the loss
    loop.py, schedule.py            steps and what happens between them; learning rates
    evaluation.py, monitor.py       scores on held-out rows; whether noise and curvature do what they should
    meter.py, logbook.py, trackers.py, progress.py, curve.py    what is seen of a run
    state.py, tensors.py, checkpoints.py, saving.py             a run on disk, whole or not there
    choose.py, resume.py            where a run begins; what may differ from the run it continues
    seeding.py, interrupt.py        random numbers of a step; wishes to stop
    run.py, training.py, finish.py, report.py, card.py          from a recipe to a published folder
    describe.py                                                 what that will be

The package can be called: `from mergekit_bayes import finetune; finetune("recipe.yaml", "tuned/")` runs `run.finetune`,
as `mergekit_bayes.merge` runs a merge and for the same reason. Importing it costs torch, and nothing heavier.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from mergekit_bayes.finetune.ivon import (
    IVON,
    Diagnostics,
    Exported,
    StartingValues,
    diagnose,
    export_precision,
    starting_values,
)

__all__ = ["IVON", "Diagnostics", "Exported", "StartingValues", "diagnose", "export_precision", "starting_values"]


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from mergekit_bayes.finetune.run import finetune

        return finetune(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
