"""A pass on disk: sums and counts of every process, whole or not there.

Sums add up, so that a pass can go on with any number of processes: each takes the states that fall to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergekit_bayes.checkpoint.disk import disk_errors
from mergekit_bayes.checkpoint.tensors import read_tensors, write_tensors
from mergekit_bayes.precision.convergence import Convergence
from mergekit_bayes.precision.estimator import Counts

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mergekit_bayes.estimate.folder import SidecarFolder

__all__ = [
    "Position",
    "Records",
    "SavedPass",
    "add_up",
    "add_up_counts",
    "finished_passes",
    "load_pass",
    "load_sums",
    "save_pass",
    "save_sums",
]

Records = list[tuple[int, dict[str, Tensor]]]
"""Of `Convergence`."""

_ITEM = "state"
_SUM, _SAMPLE = "sum", "sample"


@dataclass(frozen=True)
class Position:
    """Where a run is.

    Attributes:
        group: of targets, counted from 0.
        index: pass over the rows for this group, counted from 0.
        block: the next block of rows.
    """

    group: int
    index: int
    block: int


@dataclass(frozen=True)
class SavedPass:
    """What one process goes on from.

    Attributes:
        position: where it goes on.
        sums: its share of the sums; empty if it has none.
        counts: its share of the counts.
        records: of `Convergence`, by all processes.
    """

    position: Position
    sums: Mapping[str, Tensor]
    counts: Counts
    records: Records


def save_pass(
    folder: SidecarFolder,
    accelerator: Accelerator,
    position: Position,
    *,
    sums: Mapping[str, Tensor],
    counts: Counts,
    convergence: Convergence,
) -> None:
    """Saves a pass under way; every process calls this at the same place.

    Raises:
        OutputError: the disk failed; the state before is still there.
    """
    from accelerate.utils import gather_object

    rank = accelerator.process_index
    name = f"state-{position.group}-{position.index}-{position.block}-{rank}.safetensors"
    content = {f"{_SUM}:{key}": tensor for key, tensor in sums.items()}
    if rank == 0:
        for number, (_, sample) in enumerate(convergence.records):
            content |= {f"{_SAMPLE}:{number}:{key}": tensor for key, tensor in sample.items()}
    write_tensors(folder.staging / name, content)
    shares: list[dict[str, Any]] = gather_object([{"file": name, **asdict(counts)}])
    if rank == 0:
        units = [count for count, _ in convergence.records]
        _replace(folder, {"position": asdict(position), "shares": shares, "units": units})
    accelerator.wait_for_everyone()


def _replace(folder: SidecarFolder, record: dict[str, Any]) -> None:
    before = folder.journal.get(_ITEM)
    files = [share["file"] for share in record["shares"]]
    folder.journal.add(_ITEM, record, files)
    for share in before["shares"] if before is not None else ():
        if share["file"] not in files:
            with disk_errors(folder.staging / share["file"], "remove"):
                (folder.staging / share["file"]).unlink(missing_ok=True)


def load_pass(folder: SidecarFolder, accelerator: Accelerator) -> SavedPass | None:
    """Returns what this process goes on from; None if nothing was saved.

    Raises:
        CheckpointError: a file of it cannot be read.
    """
    record = folder.journal.get(_ITEM)
    if record is None:
        return None
    rank, world = accelerator.process_index, accelerator.num_processes
    sums: dict[str, Tensor] = {}
    records: Records = [(units, {}) for units in record["units"]]
    counts = Counts()
    for number, share in enumerate(record["shares"]):
        for name, tensor in read_tensors(folder.staging / share["file"]).items():
            kind, _, key = name.partition(":")
            if kind == _SAMPLE:
                place, _, key = key.partition(":")
                records[int(place)][1][key] = tensor
            elif number % world == rank:
                sums[key] = sums[key] + tensor if key in sums else tensor
        if number % world == rank:
            counts += Counts(share["rows"], share["units"], tuple(share["skipped"]))
    return SavedPass(Position(**record["position"]), sums, counts, records)


def save_sums(
    folder: SidecarFolder, group: int, index: int, sums: Mapping[str, Tensor], record: Mapping[str, Any]
) -> None:
    """Saves the sums of a whole pass that another one builds on; the leading process calls this.

    Args:
        folder: of the work.
        group: of targets.
        index: of the pass.
        sums: added up over processes.
        record: what else is remembered of the pass; what JSON can hold.
    """
    name = _whole_name(group, index)
    write_tensors(folder.staging / name, sums)
    folder.journal.add(name, dict(record), [name])


def finished_passes(folder: SidecarFolder, group: int) -> list[dict[str, Any]]:
    """Returns what is remembered of the whole passes of a group that were saved."""
    found: list[dict[str, Any]] = []
    while (record := folder.journal.get(_whole_name(group, len(found)))) is not None:
        found.append(record)
    return found


def load_sums(folder: SidecarFolder, group: int, index: int) -> dict[str, Tensor]:
    """Returns the sums of a whole pass that was saved."""
    return read_tensors(folder.staging / _whole_name(group, index))


def _whole_name(group: int, index: int) -> str:
    return f"pass-{group}-{index}.safetensors"


def add_up(accelerator: Accelerator, tensors: Mapping[str, Tensor]) -> None:
    """Adds tensors up over processes, in place and in the order of their names."""
    if accelerator.num_processes == 1:
        return
    for name in sorted(tensors):
        tensor = tensors[name]
        moved = tensor.to(accelerator.device)
        torch.distributed.all_reduce(moved)
        if moved is not tensor:
            tensor.copy_(moved)


def add_up_counts(accelerator: Accelerator, counts: Counts) -> Counts:
    """Returns counts added up over processes."""
    if accelerator.num_processes == 1:
        return counts
    from accelerate.utils import gather_object

    shares: list[dict[str, Any]] = gather_object([asdict(counts)])
    total = Counts()
    for share in shares:
        total += Counts(share["rows"], share["units"], tuple(share["skipped"]))
    return total
