"""The precision sidecar of what was trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mergekit_bayes.checkpoint.adapter import is_adapter, open_adapter
from mergekit_bayes.checkpoint.dtypes import dtype_named, torch_dtype
from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.index import open_checkpoint
from mergekit_bayes.checkpoint.shards import raise_together
from mergekit_bayes.checkpoint.sidecar import SidecarMetadata, check_sidecar, open_sidecar, write_sidecar
from mergekit_bayes.model.base_identity import BaseIdentity


class Exported(Protocol):
    """Precisions with what their estimator knows about them.

    Attributes:
        precisions: by the names of `saved_parameters`, at data scale.
        metadata: arguments of `SidecarMetadata`.
    """

    @property
    def precisions(self) -> Mapping[str, Tensor]:
        """S = N (h + weight_decay), by name."""

    @property
    def metadata(self) -> Mapping[str, object]:
        """What the estimator knows."""


def write_precision(
    folder: Path,
    exported: Exported,
    *,
    base: BaseIdentity,
    loss_unit: str,
    batch_size: int | None = None,
    dtype: str = "float32",
) -> Path:
    """Writes the precisions of a folder that `save_trained` wrote, and reads them back as a merge would.

    Args:
        folder: holds the adapter or model.
        exported: its precisions.
        base: what it was trained from.
        loss_unit: what the N of the precisions counts, `token` or `example`.
        batch_size: units per optimizer step.
        dtype: `float32` or `bfloat16`.

    Returns:
        The file.

    Raises:
        SidecarMismatchError: names or shapes are not those of the folder's tensors.
        NumericalError: a precision is not finite and positive.
        OutputError: the disk failed.
    """
    adapter = open_adapter(folder) if is_adapter(folder) else None
    tensors = open_checkpoint(folder).tensors if adapter is None else adapter.tensors
    described = fingerprint(tensors)
    known: dict[str, Any] = dict(exported.metadata)
    scalings = set() if adapter is None else {module.scaling for module in adapter.modules.values()}
    metadata = SidecarMetadata(
        **{
            **known,
            "space": "full" if adapter is None else "factor",
            "mean_fingerprint": described,
            "loss_unit": loss_unit,
            "batch_size": batch_size,
            "adapter_scaling": scalings.pop() if len(scalings) == 1 else None,
            "base_model": base.path,
            "base_fingerprint": base.fingerprint,
        }
    )
    stored = {name: _as(values, torch_dtype(dtype_named(dtype))) for name, values in exported.precisions.items()}
    path = write_sidecar(folder, stored, metadata)
    raise_together(
        check_sidecar(
            open_sidecar(path), mean_tensors=tensors, mean_fingerprint=described, base_fingerprint=base.fingerprint
        )
    )
    return path


def _as(values: Tensor, dtype: torch.dtype) -> Tensor:
    return values.detach().to(dtype=dtype)
