"""Precisions as a prediction is given them: in memory, or a sidecar with the means it describes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mergekit_bayes.checkpoint.adapter import is_adapter, open_adapter
from mergekit_bayes.checkpoint.files import shown
from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.checkpoint.index import open_checkpoint
from mergekit_bayes.checkpoint.kronecker_tensors import KroneckerTensors, factored_weights, kronecker_tensors
from mergekit_bayes.checkpoint.reader import BlockReader
from mergekit_bayes.checkpoint.shards import raise_together
from mergekit_bayes.checkpoint.sidecar import Sidecar, check_sidecar, open_sidecar
from mergekit_bayes.errors import CheckpointError, EvaluateError

__all__ = ["PrecisionSource", "Precisions", "gather_precisions", "read_precisions"]

PrecisionSource = Mapping[str, Tensor] | Mapping[str, float] | str | os.PathLike[str]
"""Precisions by tensor name, or the path of a sidecar or of its folder"""


@dataclass(frozen=True)
class Precisions:
    """Precisions with what is known about the means they belong to.

    Attributes:
        where: how messages call them.
        values: the diagonal part of S by the name of the tensor described; 0-dim where one number is meant for a whole
            tensor.
        factors: where the Kronecker terms of S lie, by the name of the tensor described.
        sidecar: where they come from, if from a file.
        means_on_disk: the tensors described, if they lie beside the sidecar.
    """

    where: str
    values: Mapping[str, Tensor]
    factors: Mapping[str, KroneckerTensors] = field(default_factory=dict)
    sidecar: Sidecar | None = None
    means_on_disk: Mapping[str, TensorInfo] = field(default_factory=dict)

    @property
    def of_updates(self) -> bool:
        """Whether they are of the updates that an adapter makes to the weights of its base (space product)."""
        return self.sidecar is not None and self.sidecar.metadata.space == "product"

    @property
    def prior(self) -> float | None:
        """S_0 that is in every precision, at data scale; None if that is not known."""
        return None if self.sidecar is None else self.sidecar.metadata.prior_precision

    @property
    def may_be_partial(self) -> bool:
        """Whether tensors that were not trained may be left out: with a scalar prior, or after a merge."""
        if self.sidecar is None:
            return False
        metadata = self.sidecar.metadata
        return metadata.prior_precision is not None or metadata.estimator == "merged"


def gather_precisions(source: PrecisionSource) -> Precisions:
    """Brings precisions into memory.

    Args:
        source: precisions by tensor name (a number stands for a whole tensor), or the path of a sidecar or of its
            folder. If the weights lie beside the sidecar, it must describe them.

    Raises:
        CheckpointError: the sidecar cannot be read or trusted, or does not describe the weights beside it.
        PlanError: several such reasons.
        EvaluateError: a value is no precision.
    """
    if not isinstance(source, Mapping):
        return _from_disk(Path(source))
    values = {}
    for name, value in source.items():
        if isinstance(value, Tensor):
            values[name] = value.detach()
        elif isinstance(value, int | float) and not isinstance(value, bool):
            values[name] = torch.tensor(float(value), dtype=torch.float64)
        else:
            seen = f"precision of {shown(name)}: is a {type(value).__name__}"
            raise EvaluateError(f"{seen}; expected a tensor or a number")
    return Precisions("precisions", values)


def read_precisions(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Returns the precisions of a sidecar as they are stored, whatever weights lie beside it.

    Args:
        path: a sidecar or the folder that holds it.

    Raises:
        CheckpointError: it cannot be read or trusted.
        PlanError: several such reasons.
    """
    return _read(open_sidecar(Path(path)))


def _read(sidecar: Sidecar) -> dict[str, Tensor]:
    return _tensors(sidecar, sidecar.tensors)


def _tensors(sidecar: Sidecar, names: Iterable[str]) -> dict[str, Tensor]:
    with BlockReader() as reader:
        return {name: reader.read_tensor(sidecar.tensors[name]) for name in names}


def _from_disk(path: Path) -> Precisions:
    sidecar = open_sidecar(path)
    folder = sidecar.path.parent
    adapter = open_adapter(folder) if is_adapter(folder) else None
    described = _means_beside(folder) if adapter is None else adapter.tensors
    if described:
        print_ = fingerprint(described)
        raise_together(
            check_sidecar(
                sidecar, mean_tensors=described, mean_fingerprint=print_, base_fingerprint=None, adapter=adapter
            )
        )
    factors = _factors(sidecar)
    parts = {part.name for each in factors.values() for part in each if part is not None}
    values = _tensors(sidecar, sidecar.tensors.keys() - parts)
    for name in factors.keys() - values.keys():
        if not sidecar.metadata.prior_precision:
            seen = f"{shown(sidecar.path)}: {shown(name)} has factors, but no diagonal part and no prior_precision"
            raise CheckpointError(f"{seen}; expected one of them")
        values[name] = torch.tensor(sidecar.metadata.prior_precision, dtype=torch.float64)
    return Precisions(shown(sidecar.path), values, factors, sidecar, described)


def _factors(sidecar: Sidecar) -> dict[str, KroneckerTensors]:
    if sidecar.metadata.family != "kronecker":
        return {}
    found = {name: kronecker_tensors(sidecar, name) for name in factored_weights(sidecar.tensors)}
    return {name: factors for name, factors in found.items() if factors is not None}


def _means_beside(folder: Path) -> Mapping[str, TensorInfo]:
    names = ("model.safetensors", "model.safetensors.index.json")
    return open_checkpoint(folder).tensors if any((folder / name).exists() for name in names) else {}
