"""Carry out a plan: one streaming loop over blocks, in as many threads as wanted.

Every worker takes a block, reads its bytes from all inputs, merges, checks, and writes the result to its place. No
block waits for another, and what a block computes depends on neither thread nor order: the same plan gives the same
bytes. Tensors that have to be whole are blocks of their own, and wait until there is room for them in memory; for all
others peak memory depends on the number of workers alone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mergekit_bayes.checkpoint.dtypes import DTYPES, torch_dtype
from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.checkpoint.reader import BlockReader
from mergekit_bayes.checkpoint.writer import ShardWriter
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.merge.blocks import Combine, Formula, Merged, Stored, compiled, in_chunks
from mergekit_bayes.merge.checks import check_block, check_precision, diagnose_mean, diagnose_precision
from mergekit_bayes.merge.memory import BLOCK_BYTES, Allowance, default_workers, memory_limit, whole_bytes
from mergekit_bayes.merge.modules import run_module
from mergekit_bayes.merge.normalise import with_divisors
from mergekit_bayes.merge.operands import OperandReader
from mergekit_bayes.merge.plan import MergePlan
from mergekit_bayes.merge.sink import Sink
from mergekit_bayes.merge.steps import CopyStep, MergeStep, ModuleStep, TensorStep, Unit
from mergekit_bayes.merge.tensors import run_tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

GRAIN = 65_536
"""Blocks are multiples of this many elements, and no smaller however many sources share the bytes of a block."""

Record = dict[str, Any]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Options:
    """How to carry out a plan; none of it changes the output's bytes, except `compile` and `device` in principle.

    Attributes:
        device: where blocks are merged, "cpu" or "cuda" or "cuda:1".
        threads: worker threads; 0 takes one per available core, at most eight.
        block_bytes: bytes of input per block and worker.
        compile: fuse each block into one pass with torch.compile; needs a compiler and some start-up time.
        memory_bytes: bytes that tensors which have to be whole may take together; None for what `memory_limit` allows.
    """

    device: str = "cpu"
    threads: int = 0
    block_bytes: int = BLOCK_BYTES
    compile: bool = False
    memory_bytes: int | None = None

    @property
    def workers(self) -> int:
        """Number of worker threads."""
        return self.threads or default_workers()


class Engine:
    """Runs the units of one plan.

    Args:
        plan: the plan.
        options: how to run it.
        progress: called with the number of bytes read and written since the last call, from any thread.
        divisors: what the curvatures of sources are divided by, from `normalise`.
    """

    def __init__(
        self,
        plan: MergePlan,
        options: Options,
        *,
        progress: Progress | None = None,
        divisors: Mapping[str, float] | None = None,
    ) -> None:
        self.plan = plan
        self.options = options
        self.precision_scale = plan.precision_scale
        self._progress = progress or (lambda _: None)
        self._reader = BlockReader()
        self._operands = OperandReader(self._reader, torch_dtype(plan.compute_dtype), options.device)
        self._divisors = divisors or {}
        self._combines: dict[Formula, Combine] = {}
        self._memory = Allowance(memory_limit(plan, options.memory_bytes, workers=options.workers))
        _keep_freed_memory()

    def run_unit(self, unit: Unit, folder: Path) -> dict[str, Record]:
        """Write one shard and the sidecar shard beside it.

        Args:
            unit: the unit.
            folder: where the files go.

        Returns:
            What was measured, by step name.

        Raises:
            MergekitBayesError: unreadable or illegal input, a result that is not finite, no space. The files of the
                unit are removed.
        """
        with ExitStack() as stack:
            mean = stack.enter_context(ShardWriter(folder / unit.layout.filename, unit.layout))
            precision = None
            if unit.precision_layout is not None:
                path = folder / unit.precision_layout.filename
                precision = stack.enter_context(ShardWriter(path, unit.precision_layout))
            pool = stack.enter_context(_Pool(self.options.workers))
            for step in (with_divisors(step, self._divisors) for step in unit.steps):
                if isinstance(step, TensorStep | ModuleStep):
                    pool.submit(step.name, self._run_whole, step, Sink(mean, precision))
                    continue
                for start, stop in self._ranges(step):
                    pool.submit(step.name, self._run, step, start, stop, mean, precision)
            return {name: _total(parts) for name, parts in pool.results().items()}

    def close(self) -> None:
        """Close the input files."""
        self._reader.close()

    def _ranges(self, step: MergeStep | CopyStep) -> Iterator[tuple[int, int]]:
        """Element ranges of the blocks of a step; they depend on the plan and the block size alone."""
        count = step.entries[0].numel
        per_element = sum(DTYPES[tensor.dtype].itemsize for tensor in step.inputs)
        size = max(GRAIN, self.options.block_bytes // max(1, per_element) // GRAIN * GRAIN)
        if isinstance(step, MergeStep) and any(operand.low_rank for operand in (step.base, *step.sources)):
            row = step.shape[-1]
            size = max(1, size // row) * row
        yield from ((start, min(start + size, count)) for start in range(0, max(count, 1), size))

    def _run(
        self, step: MergeStep | CopyStep, start: int, stop: int, mean: ShardWriter, precision: ShardWriter | None
    ) -> Record:
        if isinstance(step, CopyStep):
            return self._copy(step, start, stop, mean)
        return self._merge(step, start, stop, mean, precision)

    def _run_whole(self, step: TensorStep | ModuleStep, sink: Sink) -> Record:
        with self._memory.taken(whole_bytes(step, self.plan.compute_dtype)):
            if isinstance(step, TensorStep):
                record = run_tensor(step, self.plan, self._operands, sink)
            else:
                record = run_module(step, self.plan, self._operands, sink)
        written = (*step.entries, *step.precision_entries)
        self._progress(sum(tensor.nbytes for tensor in step.inputs) + sum(entry.nbytes for entry in written))
        return record

    def _copy(self, step: CopyStep, start: int, stop: int, mean: ShardWriter) -> Record:
        block = self._reader.read_block(step.tensor, start, stop - start)
        for label, tensor in step.agree:
            other = self._reader.read_block(tensor, start, stop - start)
            if not torch.equal(block.view(torch.uint8), other.view(torch.uint8)):
                raise CheckpointError(
                    f"{step.name}: {step.reason} and is copied, but {label} holds other values than "
                    f"{step.tensor.path}; expected the same bytes in every input"
                )
        stored = block.to(torch_dtype(step.dtype))
        if stored.is_floating_point():
            cast = "" if stored.dtype == block.dtype else f", written as {step.dtype},"
            check_block(stored, step.name, f"{step.tensor.path}{cast}")
        mean.write(step.name, start, stored)
        self._progress(_read_bytes(step.inputs, stop - start) + stored.nbytes)
        return {}

    def _merge(
        self, step: MergeStep, start: int, stop: int, mean: ShardWriter, precision: ShardWriter | None
    ) -> Record:
        formula = self._formula(step)
        base, sources = self._operands.block(step, start, stop)
        weights = torch.tensor(step.weights, dtype=torch.float64, device=self.options.device)
        merged = self._combine(formula)(base, sources, weights)
        self._check(step, merged, base, sources)
        mean.write(step.name, start, merged.mean.cpu())
        written = merged.mean.nbytes
        if precision is not None and merged.precision is not None:
            precision.write(step.name, start, merged.precision.cpu())
            written += merged.precision.nbytes
        self._progress(_read_bytes(step.inputs, stop - start) + written)
        return _record(step, merged)

    def _check(self, step: MergeStep, merged: Merged, base: Stored, sources: list[Stored]) -> None:
        if merged.mean.numel() == 0:
            return
        low, high = (float(bound) for bound in torch.aminmax(merged.mean))
        if merged.lowest_precision is not None and not float(merged.lowest_precision) > 0.0:
            diagnose_precision(step, self._operands, self._formula(step), self._ranges(step), sources)
        if not (abs(low) < float("inf") and abs(high) < float("inf")):
            diagnose_mean(step, base, sources)
        if merged.precision is not None:
            check_precision(merged.precision, step.name, "the merged precision")

    def _formula(self, step: MergeStep) -> Formula:
        precisions = self.plan.method.precision != "unused"
        return Formula(
            method=self.plan.method,
            dtype=torch_dtype(self.plan.compute_dtype),
            mean_dtype=torch_dtype(step.dtype),
            precision_dtype=None if step.precision_dtype is None else torch_dtype(step.precision_dtype),
            with_mismatch=precisions,
            floor=self.plan.recipe.precision.floor if precisions else None,
            precision_scale=self.precision_scale,
            options=step.options,
        )

    def _combine(self, formula: Formula) -> Combine:
        if formula not in self._combines:
            # Only methods for blocks promise to be of a kind that can be compiled.
            fuse = self.options.compile and formula.method.scope == "element"
            self._combines[formula] = compiled(formula) if fuse else in_chunks(formula)
        return self._combines[formula]

    @cached_property
    def bytes_total(self) -> int:
        """Bytes that progress will add up to."""
        return self.plan.bytes_read + self.plan.bytes_written


def _keep_freed_memory() -> None:
    """Ask glibc to keep freed blocks instead of returning every one to the system.

    The temporaries of a piece are 256 KiB each, just above the size from which glibc maps and unmaps every allocation
    by default; the page faults then take three quarters of the time. Other C libraries lack the call.
    """
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        library.mallopt(M_TRIM_THRESHOLD, 64 << 20)


def _record(step: MergeStep, merged: Merged) -> Record:
    record: Record = {}
    if merged.mismatch is not None:
        gaps = merged.mismatch.double().tolist()
        record["mismatch"] = {source.label: gap for source, gap in zip(step.sources, gaps, strict=True)}
    if merged.floored is not None:
        record["floored_entries"] = int(merged.floored)
        record["entries"] = merged.mean.numel()
    return record


def _total(parts: list[Record]) -> Record:
    """Add up the records of a step's blocks, in block order."""
    total: Record = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, Mapping):
                sums = total.setdefault(key, {})
                for label, number in value.items():
                    sums[label] = sums.get(label, 0.0) + number
            else:
                total[key] = total.get(key, 0) + value
    return total


def _read_bytes(inputs: tuple[TensorInfo, ...], count: int) -> int:
    return sum(min(tensor.nbytes, DTYPES[tensor.dtype].itemsize * count) for tensor in inputs)


class _Pool:
    """Worker threads with one arithmetic thread each; the first failure stops the rest.

    Many small workers beat one worker with many arithmetic threads here: reading, casting and writing run in parallel
    too, nothing spins at barriers, and sums do not depend on the number of threads.
    """

    def __init__(self, workers: int) -> None:
        self._pool = ThreadPoolExecutor(
            workers, thread_name_prefix="merge", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._futures: list[tuple[str, Future[Record]]] = []

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def submit(self, name: str, function: Callable[..., Record], *arguments: object) -> None:
        self._futures.append((name, self._pool.submit(function, *arguments)))

    def results(self) -> dict[str, list[Record]]:
        """Records of every step, in block order; raises the first failure of a block in plan order."""
        _, waiting = wait([future for _, future in self._futures], return_when=FIRST_EXCEPTION)
        if waiting:
            # Blocks start in plan order: when all that started are done, the first failure in plan order is known,
            # and the same bad input gives the same message every time.
            self._pool.shutdown(wait=True, cancel_futures=True)
        gathered: dict[str, list[Record]] = {}
        for name, future in self._futures:
            gathered.setdefault(name, []).append(future.result())  # raises what the block raised
        return gathered
