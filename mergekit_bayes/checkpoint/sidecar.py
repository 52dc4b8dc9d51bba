"""The precision sidecar: the file of precisions beside a checkpoint, and the words that say what they mean.

A sidecar has the tensor names and shapes of the file it describes, or in product space of the updates that an adapter
makes to the weights of its base; the family `kronecker` adds factors (see `kronecker_tensors`). Its metadata is one
JSON string under one key of the safetensors header: the reference writer orders several keys at random, one key has
one order.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from mergekit_bayes.checkpoint.disk import disk_errors, sync_folder
from mergekit_bayes.checkpoint.dtypes import dtype_of
from mergekit_bayes.checkpoint.files import listed, shown
from mergekit_bayes.checkpoint.header import Header, TensorInfo, read_header
from mergekit_bayes.checkpoint.kronecker_tensors import (
    EIGENVALUES,
    INPUT_FACTOR,
    check_factor,
    layout_faults,
    shape_faults,
    split_name,
)
from mergekit_bayes.checkpoint.shards import check_folder, open_shards, raise_together
from mergekit_bayes.checkpoint.sidecar_metadata import METADATA_KEY, SidecarMetadata
from mergekit_bayes.checkpoint.writer import ShardWriter, TensorEntry, index_name, layout_shards
from mergekit_bayes.errors import (
    CheckpointError,
    NonFiniteError,
    NonPositivePrecisionError,
    OutputError,
    SidecarMismatchError,
)

if TYPE_CHECKING:
    import torch

    from mergekit_bayes.checkpoint.adapter import Adapter

__all__ = [
    "Sidecar",
    "SidecarMetadata",
    "check_base",
    "check_sidecar",
    "find_sidecar",
    "open_sidecar",
    "write_sidecar",
]

_STEM = "precision"
_FILE = f"{_STEM}.safetensors"
_SHARD = re.compile(rf"{_STEM}-\d+-of-\d+\.safetensors")
_DTYPES = ("F32", "BF16", "F64")  # float16 cannot hold a precision above 65504


@dataclass(frozen=True)
class Sidecar:
    """Precisions on disk, known by their headers.

    Attributes:
        path: the file, or the index of its shards.
        tensors: every precision, sorted by the name of the tensor it describes, and every factor.
        metadata: what the numbers mean.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: SidecarMetadata


def find_sidecar(folder: Path) -> Path | None:
    """Returns the sidecar of a model or adapter folder: `precision.safetensors`, its index, or None.

    Raises:
        CheckpointError: there are shards of a sidecar without their index.
    """
    check_folder(folder)
    present = {path.name for path in folder.iterdir()}
    for name in (index_name(_STEM), _FILE):
        if name in present:
            return folder / name
    shards = sorted(name for name in present if _SHARD.fullmatch(name))
    if shards:
        raise CheckpointError(f"{shown(folder)}: holds {listed(shards)}; expected {index_name(_STEM)} beside them")
    return None


def open_sidecar(path: Path) -> Sidecar:
    """Opens a sidecar: headers and metadata, no precisions.

    Args:
        path: a sidecar file, the index of a sharded one, or a folder that holds either.

    Raises:
        CheckpointError: it cannot be read or trusted, its metadata is missing or invalid, a tensor has a
            type that no precision has, or factors do not belong together.
        PlanError: several such reasons.
    """
    if path.is_dir():
        found = find_sidecar(path)
        if found is None:
            raise CheckpointError(f"{shown(path)}: holds no sidecar; expected {_FILE} or {index_name(_STEM)}")
        path = found
    headers = _read(path)
    metadata = _metadata(headers)
    tensors = {name: info for header in headers for name, info in header.tensors.items()}
    faults = [fault for info in tensors.values() if (fault := _dtype_fault(info)) is not None]
    if metadata.family == "kronecker":
        faults += [CheckpointError(f"{shown(path)}: {fault}") for fault in layout_faults(tensors)]
    raise_together(faults)
    return Sidecar(path, MappingProxyType(dict(sorted(tensors.items()))), metadata)


def check_sidecar(
    sidecar: Sidecar,
    *,
    mean_tensors: Mapping[str, TensorInfo],
    mean_fingerprint: str,
    base_fingerprint: str | None,
    adapter: Adapter | None = None,
) -> list[SidecarMismatchError]:
    """Compares a sidecar with the checkpoint or adapter it should describe, and with its base.

    Args:
        sidecar: the precisions.
        mean_tensors: the tensors of the checkpoint or adapter.
        mean_fingerprint: fingerprint of `mean_tensors`.
        base_fingerprint: fingerprint of the base in use; None if there is none to compare with.
        adapter: the adapter, if the mean is one; precisions in product space describe its updates.

    Returns:
        Every disagreement, each with both values; empty if the sidecar belongs. A sidecar with a scalar prior, or from
        a merge, may leave tensors out: there the posterior is the prior.
    """
    product = sidecar.metadata.space == "product"
    if product and adapter is None:
        seen = f"{shown(sidecar.path)}: describes the updates of an adapter (space product)"
        return [SidecarMismatchError(f"{seen}; expected the adapter it belongs to, not a full model")]
    shapes = {name: info.shape for name, info in mean_tensors.items()}
    needed = {name for name, info in mean_tensors.items() if info.floating}
    if product and adapter is not None:
        shapes = _updated(adapter)
        needed = set(shapes)
    faults = [*_name_faults(sidecar, shapes, needed), *_shape_faults(sidecar, shapes, oriented=product)]
    problems = [SidecarMismatchError(f"{shown(sidecar.path)}: {fault}") for fault in faults]
    described = sidecar.metadata.mean_fingerprint
    if described != mean_fingerprint:
        seen = f"{shown(sidecar.path)}: describes weights with fingerprint {described}"
        expected = f"expected {mean_fingerprint}, that of the weights beside it"
        problems.append(SidecarMismatchError(f"{seen}; {expected}; were they trained further or replaced?"))
    return [*problems, *check_base(sidecar, base_fingerprint)]


def check_base(sidecar: Sidecar, base_fingerprint: str | None) -> list[SidecarMismatchError]:
    """Compares the base that a sidecar records with the one in use.

    Args:
        sidecar: the precisions.
        base_fingerprint: fingerprint of the base in use; None if there is none to compare with.

    Returns:
        The disagreement, with both values; empty if there is none, or the sidecar records no base.
    """
    recorded, model = sidecar.metadata.base_fingerprint, sidecar.metadata.base_model
    if recorded is None or base_fingerprint in (None, recorded):
        return []
    seen = f"{shown(sidecar.path)}: belongs to a base with fingerprint {recorded}"
    name = f" ({shown(model)})" if model else ""
    return [SidecarMismatchError(f"{seen}{name}; expected {base_fingerprint}, that of the base in use")]


def write_sidecar(path: Path, tensors: Mapping[str, torch.Tensor], metadata: SidecarMetadata) -> Path:
    """Writes precisions held in memory; the file appears whole or not at all, with the mode the umask gives.

    Args:
        path: an existing folder, which gets `precision.safetensors`, or the file itself; a file there is
            replaced.
        tensors: precisions by the name of the tensor they describe: float32, bfloat16 or float64, finite, > 0; in the
            family `kronecker` also factors, symmetric, with no negative entry on their diagonal.
        metadata: what they mean.

    Returns:
        The file.

    Raises:
        NonFiniteError: a precision is NaN or infinite.
        NonPositivePrecisionError: a precision is zero or negative, or a factor cannot be positive semidefinite.
        NumericalError: a factor is not symmetric.
        CheckpointError: a tensor has another type.
        OutputError: the file cannot be written, or the folder already has a sharded sidecar.
    """
    target = path / _FILE if path.is_dir() else path
    index = target.with_name(index_name(target.name.removesuffix(".safetensors")))
    if index.exists():
        raise OutputError(f"{shown(index)}: exists; a single file beside it would contradict it; remove it first")
    check_values(tensors, metadata)
    entries = [TensorEntry(name, dtype_of(tensor), tuple(tensor.shape)) for name, tensor in sorted(tensors.items())]
    (layout,) = layout_shards(entries, stem=_STEM, max_shard_bytes=1 << 62, metadata=metadata.to_metadata())
    fresh = target.with_name(f".{target.name[:64]}.{os.getpid()}.new")
    with ShardWriter(fresh, layout) as writer:
        for name, tensor in tensors.items():
            writer.write(name, 0, tensor.detach().cpu().contiguous().reshape(-1))
    with disk_errors(target, "write"):
        fresh.replace(target)
        sync_folder(target.parent)
    return target


def _read(path: Path) -> list[Header]:
    suffix = ".safetensors.index.json"
    if path.name != _FILE and not path.name.endswith(suffix):
        return [read_header(path)]
    problems: list[CheckpointError] = []
    headers = open_shards(path.parent, path.name.removesuffix(suffix).removesuffix(".safetensors"), problems)
    raise_together(problems)
    return headers


def _metadata(headers: list[Header]) -> SidecarMetadata:
    texts = {header.metadata.get(METADATA_KEY): header.path for header in headers}
    for text, path in texts.items():
        if text is None:
            expected = f"expected the metadata of a precision sidecar under {METADATA_KEY}"
            raise CheckpointError(f"{shown(path)}: says nothing about its numbers; {expected}")
    if len(texts) > 1:
        first, second = list(texts.values())[:2]
        raise CheckpointError(f"{shown(first)}: its metadata differs from that of {shown(second)}; expected one text")
    return SidecarMetadata.from_json(next(text for text in texts if text is not None), where=shown(headers[0].path))


def _dtype_fault(info: TensorInfo) -> CheckpointError | None:
    if info.dtype in _DTYPES:
        return None
    seen = f"{shown(info.path)}: tensor {shown(info.name)}: its dtype is {info.dtype}"
    return CheckpointError(f"{seen}; expected one of {', '.join(_DTYPES)} for a precision")


def _updated(adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """What product space describes: updates as (out, in), of embeddings (words, length), and tensors stored whole."""
    updates = {}
    for name, module in adapter.modules.items():
        sides = (module.b.shape[0], module.a.shape[1])
        updates[adapter.base_tensor(name)] = sides[::-1] if module.kind == "embedding" else sides
    return {**updates, **{name: info.shape for name, info in adapter.saved.items()}}


def _name_faults(sidecar: Sidecar, shapes: Mapping[str, tuple[int, ...]], needed: Collection[str]) -> Iterator[str]:
    factored = sidecar.metadata.family == "kronecker"
    held = {split_name(name)[0] if factored and name not in shapes else name for name in sidecar.tensors}
    missing = sorted(set(needed) - held)
    unknown = sorted(held - shapes.keys())
    product = sidecar.metadata.space == "product"
    one, of = ("update", "adapter") if product else ("tensor", "checkpoint")
    complete = sidecar.metadata.prior_precision is None and sidecar.metadata.estimator != "merged"
    if missing and complete:
        yield (
            f"holds no precision for {listed(missing)}; expected one for every {one} of the {of}, or a "
            "prior_precision that stands in for the others"
        )
    if unknown:
        yield f"holds precisions for {listed(unknown)}; expected only {one}s of the {of}"


def _shape_faults(sidecar: Sidecar, shapes: Mapping[str, tuple[int, ...]], *, oriented: bool) -> Iterator[str]:
    whole = "updates of the adapter" if oriented else "checkpoint"
    for name in sorted(sidecar.tensors.keys() & shapes.keys()):
        if sidecar.tensors[name].shape != shapes[name]:
            seen = f"precision of {shown(name)} has shape {sidecar.tensors[name].shape}"
            yield f"{seen}; expected {shapes[name]}, as in the {whole}"
    if sidecar.metadata.family == "kronecker":
        yield from shape_faults(sidecar.tensors, shapes, oriented=oriented)


def check_values(tensors: Mapping[str, torch.Tensor], metadata: SidecarMetadata) -> None:
    """Refuses numbers that no sidecar holds; the errors are those of `write_sidecar`."""
    for name, tensor in tensors.items():
        weight, part = split_name(name)
        if metadata.family == "kronecker" and part is not None and f"{weight}.{INPUT_FACTOR}" in tensors:
            _check_dtype(name, tensor)
            check_factor(name, part, tensor, basis=f"{weight}.{EIGENVALUES}" in tensors)
        else:
            _check_diagonal(name, tensor)


def _check_dtype(name: str, tensor: torch.Tensor) -> None:
    if dtype_of(tensor) not in _DTYPES:
        raise CheckpointError(f"precision of {shown(name)}: dtype {tensor.dtype}; expected float32 or bfloat16")


def _check_diagonal(name: str, tensor: torch.Tensor) -> None:
    _check_dtype(name, tensor)
    bad = int((~tensor.isfinite()).sum())
    if bad:
        raise NonFiniteError(f"precision of {shown(name)}: {bad} of {tensor.numel()} entries are not finite")
    bad = int((tensor <= 0).sum())
    if bad:
        seen = f"precision of {shown(name)}: {bad} of {tensor.numel()} entries are not positive"
        raise NonPositivePrecisionError(f"{seen}; the smallest is {float(tensor.min())}; expected all > 0")
