"""The optimizer: a mean and a curvature for every weight.

- optimizer.py: samples weights, keeps a mean and a curvature
- options.py: which values its options may take
- noise.py: normal numbers that depend on (seed, draw, sample, place) and on nothing else
- sampling.py: from means to a sample and back
- pack.py: small parameters side by side in memory, so that a step is few operations
- underway.py: the gradients of one step, over micro-batches and samples
- update.py: the equations on tensors, by operations that need no compiler
- fused.py: the same, compiled
- apply.py: which of the two, for everything that got a gradient
- loading.py: a saved state, taken over in float32
- finite.py: may the step be taken
- prior.py: a weight decay that changes
- sharding.py: weights spread over processes
- reduction.py: averages over processes that each draw their own sample
- export.py: curvature to precision
- diagnostics.py: does the curvature carry information; starting values from a noise-to-weight ratio
"""

from __future__ import annotations

from mergekit_bayes.finetune.ivon.diagnostics import Diagnostics, StartingValues, diagnose, starting_values
from mergekit_bayes.finetune.ivon.export import Exported, export_precision
from mergekit_bayes.finetune.ivon.optimizer import IVON

__all__ = ["IVON", "Diagnostics", "Exported", "StartingValues", "diagnose", "export_precision", "starting_values"]
