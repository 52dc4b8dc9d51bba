"""Everything that is written when an estimate is finished: sidecar, figure, report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any

from mergekit_bayes.checkpoint.disk import write_atomically
from mergekit_bayes.checkpoint.kronecker_tensors import split_name
from mergekit_bayes.checkpoint.sidecar import SidecarMetadata, open_sidecar
from mergekit_bayes.estimate.folder import FIGURE_NAME, REPORT_NAME, SidecarFolder
from mergekit_bayes.estimate.picture import draw_convergence
from mergekit_bayes.estimate.report import convergence_of, report_text
from mergekit_bayes.estimate.request import Request
from mergekit_bayes.estimate.sidecar import check_written, join_groups
from mergekit_bayes.model.environment import peak_memory, versions
from mergekit_bayes.precision.convergence import Change

__all__ = ["Finished", "finish"]


@dataclass(frozen=True)
class Finished:
    """An estimate whose tensors are in files.

    Attributes:
        metadata: of the sidecar.
        files: names of the files of its groups.
        rows: what became of the rows; None where none were looked at.
        units: that were counted; None where none were.
        series: how far the estimate moved, by what is drawn as one line.
        notes: what people should know.
    """

    metadata: SidecarMetadata
    files: Sequence[str]
    rows: Mapping[str, Any] | None
    units: int | None
    series: Mapping[str, Sequence[Change]]
    notes: Sequence[str]


def finish(request: Request, folder: SidecarFolder, found: Finished) -> Mapping[str, Any]:
    """Writes sidecar, figure and report, reads the sidecar back, and puts them all in place.

    Returns:
        The content of the report.

    Raises:
        OutputError: the disk failed.
    """
    staging = folder.staging
    names = join_groups(staging, found.files, found.metadata)
    check_written(staging, request.trained)
    if any(found.series.values()):
        assert found.metadata.loss_unit is not None
        draw_convergence(staging / FIGURE_NAME, found.series, unit=found.metadata.loss_unit)
        names = [FIGURE_NAME, *names]
    text = report_text(_report(request, folder, found, [name for name in names if name != FIGURE_NAME]))
    write_atomically(staging / REPORT_NAME, text.encode())
    folder.publish([REPORT_NAME, *names])
    content: dict[str, Any] = json.loads(text)
    return content


def _report(request: Request, folder: SidecarFolder, found: Finished, names: Sequence[str]) -> dict[str, Any]:
    recipe, metadata = request.recipe, found.metadata
    tensors = open_sidecar(folder.staging).tensors
    factored = metadata.family == "kronecker"
    described = {split_name(name)[0] if factored else name for name in tensors}
    return {
        "recipe": recipe.resolved(),
        "estimator": recipe.estimator.plain(),
        "family": metadata.family,
        "metadata": asdict(metadata),
        "tensors": {"described": len(described), "stored": len(tensors)},
        "groups": len(found.files),
        "rows": found.rows,
        "units": {"unit": metadata.loss_unit, "seen": found.units, "num_examples": metadata.num_examples},
        "convergence": {name: convergence_of(changes) for name, changes in found.series.items()},
        "files": {name: {"bytes": (folder.staging / name).stat().st_size} for name in names},
        "notes": list(found.notes),
        "seconds": monotonic() - request.began,
        "peak_memory": peak_memory(),
        "device": request.accelerator.device.type,
        "processes": request.accelerator.num_processes,
        "versions": versions(),
    }
