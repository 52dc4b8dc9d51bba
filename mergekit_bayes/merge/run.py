"""From a plan to a finished folder: shards, then everything around them, then one rename.

Under `torchrun` or `accelerate launch` the shards are divided over the processes; the first process prepares the
folder and publishes it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_bayes.checkpoint.output import OutputFolder
from mergekit_bayes.errors import OutputError, RecipeError
from mergekit_bayes.merge.finish import finish_folder
from mergekit_bayes.merge.memory import BLOCK_BYTES, require_memory
from mergekit_bayes.merge.plan import MergePlan, plan_merge
from mergekit_bayes.merge.processes import Processes
from mergekit_bayes.merge.provenance import REPORT_NAME
from mergekit_bayes.merge.schemas import method_schemas
from mergekit_bayes.merge.steps import Unit
from mergekit_bayes.recipe import MergeRecipe, load_recipe

COMPILE_FROM_BYTES = 24 << 30
"""From this much work on, fusing the arithmetic saves more time than the compiler takes."""


APPROXIMATIONS = {
    "cross_terms": "cross terms of averaging A and B separately, relative to the exact update",
    "iterations": "iterations of the solver",
    "lost_energy": "share of the update's squared norm lost to the rank",
    "residual": "relative residual of the solver",
    "truncation_loss": "predicted loss of what the rank cuts off, in nats (with `scale: mean`, per training unit)",
    "variance_misfit": "relative error of the variance in the factors' precisions",
}
"""What a report's measures of approximations say, in words."""


@dataclass(frozen=True)
class MergeResult:
    """A finished merge.

    Attributes:
        folder: the output, loadable by `from_pretrained`.
        report: the content of its report; empty in every process but the leading one.
    """

    folder: Path
    report: Mapping[str, Any]

    def summary(self) -> str:
        """What was written and what the merge is predicted to cost each source, for a terminal."""
        if not self.report:
            return ""
        tensors = self.report["tensors"]
        dropped = f", {len(tensors['dropped'])} of the base dropped" if tensors["dropped"] else ""
        lines = [f"{self.folder}: {tensors['merged']} tensors merged, {len(tensors['copied'])} copied{dropped}"]
        for label, divisor in self.report["method"]["curvature_divided_by"].items():
            lines.append(f"  curvature of {label}: divided by {divisor:.4g} to be as large as the others' on average")
        for label, gap in self.report["mismatch"].items():
            unit = f" ({gap['per_unit']:.3g} per training unit)" if gap["per_unit"] is not None else ""
            layer, cost = max(gap["by_layer"].items(), key=lambda item: float(item[1]))
            most = f", most in {layer} ({cost / gap['total']:.0%})" if gap["total"] > 0 else ""
            lines.append(f"  predicted loss increase of {label}: {gap['total']:.4g}{unit}{most}")
        for label, share in self.report["responsibilities"].items():
            lines.append(f"  share of {label} in its task: {share:.3g} on average over the tensors")
        for key, worst in self.report["largest"].items():
            lines.append(f"  {APPROXIMATIONS[key]}: at most {worst['value']:.3g}, in {worst['layer']}")
        lines += [f"  note: {note}" for note in tensors["notes"]]
        return "\n".join(lines)


def merge(
    recipe: Path | str | Mapping[str, Any],
    out: Path | str | None = None,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    threads: int | None = None,
) -> MergeResult:
    """Run a merge recipe.

    Args:
        recipe: path of a recipe, or its content as a dictionary.
        out: output folder; wins over the recipe's `output.path`.
        overwrite: replace an existing output folder, once the new one is complete.
        device: where the arithmetic happens, "cpu" or a CUDA device.
        threads: worker threads; None takes one per core, at most eight.

    Returns:
        The finished merge.

    Raises:
        RecipeError: the recipe cannot be read; every problem at once.
        PlanError: recipe and inputs do not fit; every problem at once.
        MergekitBayesError: illegal numbers, unreadable input, no space. Nothing existing was touched.
    """
    loaded = load_recipe(recipe, expect=MergeRecipe, methods=method_schemas())
    folder = None if isinstance(recipe, Mapping) else Path(recipe).resolve().parent
    plan = plan_merge(loaded, None if out is None else Path(out), recipe_dir=folder)
    return run_merge(plan, overwrite=overwrite, device=device, threads=threads)


def run_merge(
    plan: MergePlan,
    *,
    overwrite: bool = False,
    device: str = "cpu",
    threads: int | None = None,
    max_memory: int | None = None,
    compile: bool | None = None,
    progress: bool = False,
) -> MergeResult:
    """Carry out a plan.

    Args:
        plan: what to do.
        overwrite: replace an existing output folder, once the new one is complete.
        device: where the arithmetic happens.
        threads: worker threads; None takes one per core, at most eight.
        max_memory: bytes that blocks in flight, and tensors that have to be whole, may take; None for 16 MiB of input
            per worker, and for a whole tensor per worker within half of the machine's memory.
        compile: fuse the arithmetic with torch.compile; None decides by the amount of work.
        progress: show a progress bar on standard error.

    Returns:
        The finished merge.

    Raises:
        MergekitBayesError: illegal numbers, unreadable input, no space, a folder in the way. Nothing existing was
            touched, and a rerun continues from the shards that were finished.
    """
    if plan.out is None:
        raise RecipeError("output.path: no output folder; name one in the recipe or after it on the command line")
    processes = Processes.from_environment()
    options = _options(plan, device, threads, max_memory, compile)
    folder = OutputFolder(
        plan.out,
        overwrite=overwrite,
        inputs=[path for source in plan.inputs for path in source.places],
        job=_job(plan, options.device, options.compile),
        leader=processes.leader,
    )
    if processes.leader:
        folder.recover()
        folder.check()
    with processes.together(), folder:
        processes.barrier()  # the leader has prepared the folder
        divisors = _divisors(plan)
        records = _run_units(plan, folder, options, processes, divisors=divisors, progress=progress)
        if not processes.leader:
            return MergeResult(plan.out, {})
        chosen = {"compile": options.compile, "device": options.device}
        finish_folder(plan, folder.staging, records, chosen, divisors)
        text = (folder.staging / REPORT_NAME).read_text(encoding="utf-8")
        folder.publish()
    return MergeResult(plan.out, json.loads(text))


def _files(unit: Unit) -> list[str]:
    layouts = (unit.layout, unit.precision_layout)
    return [layout.filename for layout in layouts if layout is not None]


def _options(plan: MergePlan, device: str, threads: int | None, max_memory: int | None, compile: bool | None) -> Any:
    from mergekit_bayes.merge.execute import Options

    if device != "cpu":
        _check_device(device)
    work = plan.bytes_read + plan.bytes_written
    if compile and not _can_compile():
        raise OutputError("--compile: torch.compile does not work here; install a C++ compiler, or use --no-compile")
    chosen = compile if compile is not None else work >= COMPILE_FROM_BYTES and _can_compile()
    options = Options(device=device, threads=threads or 0, compile=chosen)
    if max_memory is None:
        return options
    require_memory(plan, max_memory)
    # A block's inputs, its results and the temporaries between take about three times the inputs.
    block = min(BLOCK_BYTES, max_memory // (3 * options.workers))
    return Options(device, threads or 0, block, chosen, memory_bytes=max_memory)


def _check_device(device: str) -> None:
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise OutputError(
            f"--device {device}: cannot be used ({str(error).splitlines()[0]}); expected cpu or cuda"
        ) from error


def _can_compile() -> bool:
    """Whether torch.compile works here, found out by trying: it needs a C++ compiler and its headers."""
    import torch

    with suppress(Exception):  # the compiler's failures have no common class
        torch.compile(torch.neg)(torch.ones(8))
        return True
    return False


def _job(plan: MergePlan, device: str, compile: bool) -> str:
    text = json.dumps([plan.job, device, compile])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _divisors(plan: MergePlan) -> dict[str, float]:
    from mergekit_bayes.merge.normalise import curvature_divisors

    return curvature_divisors(plan)


def _run_units(
    plan: MergePlan,
    folder: OutputFolder,
    options: Any,
    processes: Processes,
    *,
    divisors: Mapping[str, float],
    progress: bool,
) -> dict[str, Any]:
    from mergekit_bayes.merge.execute import Engine

    records: dict[str, Any] = {}
    mine = [unit for index, unit in enumerate(plan.units) if index % processes.count == processes.rank]
    todo = [unit for unit in mine if folder.finished(unit.layout.filename) is None]
    if processes.leader:
        unfinished = [unit for unit in plan.units if folder.finished(unit.layout.filename) is None]
        folder.require_space(sum(unit.bytes_written for unit in unfinished))
    total = sum(unit.bytes_read + unit.bytes_written for unit in todo)
    with _bar(total, show=progress and processes.leader) as advance:
        engine = Engine(plan, options, progress=advance, divisors=divisors)
        try:
            for unit in todo:
                record = engine.run_unit(unit, folder.staging)
                folder.finish(unit.layout.filename, record, files=_files(unit))
        finally:
            engine.close()
    processes.barrier()
    for unit in plan.units:
        records.update(folder.finished(unit.layout.filename) or {})
    return records


@contextmanager
def _bar(total: int, *, show: bool) -> Iterator[Any]:
    """A progress bar in bytes with rate and remaining time; `advance(bytes)` may be called from any thread."""
    if not show:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = ("merging", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("merge", total=total)
        yield lambda count: bar.advance(task, count)
