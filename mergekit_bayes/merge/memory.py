"""How much memory a plan will take at its peak, estimated from shapes alone, and who may take it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mergekit_bayes.checkpoint.disk import format_bytes
from mergekit_bayes.errors import OutputError
from mergekit_bayes.merge.plan import MergePlan
from mergekit_bayes.merge.steps import ModuleStep, Operand, TensorStep

LIBRARY_BYTES = 320 << 20
"""Resident size of Python with torch loaded, before the first block."""

BLOCK_BYTES = 16 << 20
"""Bytes of input in flight per worker: large enough for full disk bandwidth, small enough not to matter in memory."""

WORKING_COPIES = 10
"""Tensors of the merged size that a method which sees whole tensors may need beside its inputs: those of a conjugate
gradient solver, or a decomposition and its result."""

COPIES_PER_SOURCE = 3
"""The same for every source: its task vector, and what a decomposition makes of it."""

FACTOR_COPIES, BASIS_COPIES = 4, 4
"""How often Kronecker factors are held while they are shrunk and turned into a common basis, and what finding that
basis takes, in matrices of the factors' sizes."""


def default_workers() -> int:
    """Worker threads where none are asked for: one per core this process may use, at most eight."""
    return min(8, len(os.sched_getaffinity(0)))


def peak_memory(plan: MergePlan, *, workers: int | None = None, block_bytes: int = BLOCK_BYTES) -> int:
    """Estimated peak resident bytes: the libraries, and per worker a block or the largest tensor that has to be whole.

    Args:
        plan: the plan.
        workers: worker threads; None for the default.
        block_bytes: bytes of input per block.

    Returns:
        Bytes.
    """
    count = workers or default_workers()
    whole = min(count * largest_whole(plan)[0], memory_limit(plan, workers=count))
    # Inputs, results and the temporaries between them.
    return LIBRARY_BYTES + max(count * 3 * block_bytes, whole)


def largest_whole(plan: MergePlan) -> tuple[int, str]:
    """Bytes that the largest tensor which has to be whole takes while it is merged, and its name; 0 if none has to."""
    sizes = [
        (whole_bytes(step, plan.compute_dtype), step.name)
        for step in plan.steps
        if isinstance(step, TensorStep | ModuleStep)
    ]
    return max(sizes, default=(0, ""))


def memory_limit(plan: MergePlan, allowed: int | None = None, *, workers: int) -> int:
    """Bytes that all tensors which have to be whole may take at one time.

    Args:
        plan: the plan.
        allowed: what the user allows; None for one tensor per worker, within half of the machine's memory.
        workers: worker threads.
    """
    largest = largest_whole(plan)[0]
    if allowed is not None:
        return allowed
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(largest, min(workers * largest, installed // 2))


def require_memory(plan: MergePlan, allowed: int | None) -> None:
    """Refuse a limit that a tensor which has to be whole does not fit into.

    Raises:
        OutputError: with the tensor and what it takes.
    """
    largest, name = largest_whole(plan)
    if allowed is not None and largest > allowed:
        raise OutputError(
            f"--max-memory {format_bytes(allowed)}: {plan.method.name} has to see {name} whole, which takes about "
            f"{format_bytes(largest)}; expected at least that"
        )


def whole_bytes(step: TensorStep | ModuleStep, compute_dtype: str) -> int:
    """Estimated bytes that a tensor which has to be whole takes while it is merged.

    Args:
        step: its step.
        compute_dtype: "F32" or "F64".
    """
    item = 8 if compute_dtype == "F64" else 4
    return _tensor_bytes(step, item) if isinstance(step, TensorStep) else _module_bytes(step, item)


def _tensor_bytes(step: TensorStep, item: int) -> int:
    stored = sum(tensor.nbytes for tensor in step.inputs)
    copies = 2 + (2 + COPIES_PER_SOURCE) * len(step.sources) + WORKING_COPIES
    return stored + copies * step.numel * item + _curvature_bytes(step.sources, item)


def _curvature_bytes(sources: Sequence[Operand | None], item: int) -> int:
    """What Kronecker factors take beside the bytes they are read from."""
    known = [each.curvature for each in sources if each is not None and each.curvature is not None]
    parts = [tensor for curvature in known for tensor in curvature.tensors]
    largest = max((sum(tensor.numel for tensor in curvature.tensors) for curvature in known), default=0)
    return (FACTOR_COPIES * sum(tensor.numel for tensor in parts) + BASIS_COPIES * largest) * item


def _module_bytes(step: ModuleStep, item: int) -> int:
    factors = sum(tensor.nbytes for tensor in step.inputs) + step.rank * (step.in_features + step.out_features) * item
    # In product space: merged mean, its precision, what that makes of the mean, as much again while it is decomposed,
    # the products of trial factors, and a prior of that size.
    layers = 8 + len(step.base.tensors)
    if step.whole:
        layers += (1 + COPIES_PER_SOURCE) * len(step.sources) + WORKING_COPIES
    dense = layers * step.in_features * step.out_features * item if step.mode == "product" else 0
    return 3 * factors + dense + _curvature_bytes(step.sources, item)


class Allowance:
    """Memory that several threads share: each waits until what it needs is free.

    Args:
        limit: bytes; one that needs more than that has them when nobody else has any.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, nbytes: int) -> Iterator[None]:
        """Have so many bytes for the duration of a block."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + nbytes <= self._limit)
            self._used += nbytes
        try:
            yield
        finally:
            with self._changed:
                self._used -= nbytes
                self._changed.notify_all()
