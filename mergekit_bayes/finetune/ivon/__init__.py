"""The optimizer: a mean and a curvature for every weight.

- optimizer.py: samples weights, keeps a mean and a curvature
- update.py: its equations on tensors, block by block
- noise.py: normal numbers that depend on (seed, draw, sample, parameter) and on nothing else
- options.py: which values its options may take
- reduction.py: averages over processes, where every process draws its own sample
- export.py: curvature to precision
- diagnostics.py: does the curvature carry information; starting values from a noise-to-weight ratio
"""

from __future__ import annotations

from mergekit_bayes.finetune.ivon.diagnostics import Diagnostics, StartingValues, diagnose, starting_values
from mergekit_bayes.finetune.ivon.export import Exported, export_precision
from mergekit_bayes.finetune.ivon.optimizer import IVON

__all__ = ["IVON", "Diagnostics", "Exported", "StartingValues", "diagnose", "export_precision", "starting_values"]
