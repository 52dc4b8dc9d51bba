"""Finetuning that leaves a posterior behind.

- ivon/: the optimizer, its export to precisions, its diagnostics
"""

from __future__ import annotations

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
