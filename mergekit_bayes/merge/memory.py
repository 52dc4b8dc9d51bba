"""How much memory a plan will take at its peak, estimated from shapes alone."""

from __future__ import annotations

import os

from mergekit_bayes.merge.plan import MergePlan
from mergekit_bayes.merge.steps import ModuleStep

LIBRARY_BYTES = 320 << 20
"""Resident size of Python with torch loaded, before the first block."""

BLOCK_BYTES = 16 << 20
"""Bytes of input in flight per worker: large enough for full disk bandwidth, small enough not to matter in memory."""


def default_workers() -> int:
    """Worker threads where none are asked for: one per core this process may use, at most eight."""
    return min(8, len(os.sched_getaffinity(0)))


def peak_memory(plan: MergePlan, *, workers: int | None = None, block_bytes: int = BLOCK_BYTES) -> int:
    """Estimated peak resident bytes: the libraries, and per worker a block or the largest adapted layer.

    Args:
        plan: the plan.
        workers: worker threads; None for the default.
        block_bytes: bytes of input per block.

    Returns:
        Bytes.
    """
    item = 8 if plan.compute_dtype == "F64" else 4
    layers = [_module_bytes(step, item) for step in plan.steps if isinstance(step, ModuleStep)]
    # Inputs, results and the temporaries between them.
    block = 3 * block_bytes
    return LIBRARY_BYTES + (workers or default_workers()) * max([block, *layers])


def _module_bytes(step: ModuleStep, item: int) -> int:
    factors = sum(tensor.nbytes for tensor in step.inputs) + step.rank * (step.in_features + step.out_features) * item
    # In product space: merged mean, its precision, as much again while it is decomposed, and a prior of that size.
    layers = 5 + len(step.base.tensors)
    dense = layers * step.in_features * step.out_features * item if step.mode == "product" else 0
    return 3 * factors + dense
