"""From the curvature of the rows to precisions in files: scaled to N units, with the prior, checked, in shards.

    S = (N / units counted) H + S_0,     S_0 = N weight_decay

with S_0 in every diagonal, and beside the factors of a Kronecker curvature in the metadata alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_bayes.checkpoint.disk import write_atomically
from mergekit_bayes.checkpoint.dtypes import dtype_named
from mergekit_bayes.checkpoint.header import TensorInfo, read_header
from mergekit_bayes.checkpoint.kronecker_tensors import EIGENVALUES, factored_weights, split_name
from mergekit_bayes.checkpoint.reader import BlockReader
from mergekit_bayes.checkpoint.shards import raise_together
from mergekit_bayes.checkpoint.sidecar import SidecarMetadata, check_sidecar, check_values, open_sidecar
from mergekit_bayes.checkpoint.writer import ShardWriter, TensorEntry, index_json, index_name, layout_shards
from mergekit_bayes.model.trained import Trained
from mergekit_bayes.precision.scale import scaled

__all__ = ["check_written", "describe_precision", "join_groups", "precisions", "write_group"]

_STEM = "precision"
_MAX_SHARD_BYTES = 5 * 10**9
_BLOCK = 1 << 24  # elements
_CENTRES = {"factor": "zero", "product": "base", "full": "base"}


def describe_precision(
    trained: Trained, known: Mapping[str, Any], *, num_examples: int, weight_decay: float
) -> SidecarMetadata:
    """Returns the metadata of a sidecar.

    Args:
        trained: what is described.
        known: what the estimator knows: family, estimator, space, loss_unit, batch_size, and more.
        num_examples: N.
        weight_decay: L2 rate of the mean loss.
    """
    modules = trained.adapter.modules.values() if trained.adapter is not None else ()
    scalings = {module.scaling for module in modules}
    base, base_fingerprint = trained.base
    return SidecarMetadata(
        **known,
        mean_fingerprint=trained.fingerprint,
        num_examples=num_examples,
        weight_decay=weight_decay,
        prior_precision=num_examples * weight_decay,
        prior_mean=_CENTRES[known["space"]],
        adapter_scaling=scalings.pop() if len(scalings) == 1 else None,
        base_model=base,
        base_fingerprint=base_fingerprint,
    )


def precisions(
    curvature: Mapping[str, Tensor], metadata: SidecarMetadata, *, units: float, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Returns the tensors of a sidecar, on CPU.

    Args:
        curvature: of the loss summed over some units, by sidecar names.
        metadata: of the sidecar; gives N and the prior.
        units: how many that were.
        dtype: what is stored, but for bases of factors, which would lose their orthogonality.

    Raises:
        NumericalError: values that no precision has.
    """
    assert metadata.num_examples is not None
    assert metadata.prior_precision is not None
    based = {weight for weight, parts in factored_weights(curvature).items() if EIGENVALUES in parts}
    found = {}
    for name, tensor in scaled(curvature, metadata.num_examples / units).items():
        weight, part = split_name(name)
        factored = metadata.family == "kronecker" and part is not None
        value = tensor.cpu() if factored else tensor.cpu() + metadata.prior_precision
        found[name] = value.to(_stored_dtype(name, metadata, dtype, based=weight in based))
    check_values(found, metadata)
    return found


def write_group(
    path: Path, curvature: Mapping[str, Tensor], metadata: SidecarMetadata, *, units: float, dtype: torch.dtype
) -> None:
    """Writes the tensors of a sidecar that one group of targets gives, one target after the other.

    Only one target at a time is copied: the curvature itself may take most of the memory.

    Args:
        path: the file.
        curvature: as for `precisions`, like the arguments after it.
        metadata: of the sidecar.
        units: that the curvature was summed over.
        dtype: what is stored.

    Raises:
        NumericalError: values that no precision has.
        OutputError: the disk failed.
    """
    targets: dict[str, dict[str, Tensor]] = {}
    for name, tensor in curvature.items():
        factored = metadata.family == "kronecker"
        targets.setdefault(split_name(name)[0] if factored else name, {})[name] = tensor
    entries = []
    for parts in targets.values():
        based = any(name.endswith(f".{EIGENVALUES}") for name in parts)
        for name, tensor in parts.items():
            stored = _stored_dtype(name, metadata, dtype, based=based)
            entries.append(TensorEntry(name, dtype_named(str(stored).removeprefix("torch.")), tuple(tensor.shape)))
    (layout,) = layout_shards(entries, stem=path.stem, max_shard_bytes=1 << 62, metadata={})
    with ShardWriter(path, layout) as writer:
        for parts in targets.values():
            for name, tensor in precisions(parts, metadata, units=units, dtype=dtype).items():
                writer.write(name, 0, tensor.contiguous().reshape(-1))


def _stored_dtype(name: str, metadata: SidecarMetadata, dtype: torch.dtype, *, based: bool) -> torch.dtype:
    part = split_name(name)[1] if metadata.family == "kronecker" else None
    return torch.float32 if based and part not in (None, EIGENVALUES) else dtype


def join_groups(staging: Path, groups: Sequence[str], metadata: SidecarMetadata) -> list[str]:
    """Makes one sidecar of the files of all groups.

    Args:
        staging: where they are, and where the sidecar goes.
        groups: names of their files.
        metadata: of the sidecar.

    Returns:
        Names of its files, an index last.

    Raises:
        OutputError: the disk failed.
    """
    infos: dict[str, TensorInfo] = {}
    for name in groups:
        infos.update(read_header(staging / name).tensors)
    entries = [TensorEntry(name, info.dtype, info.shape) for name, info in sorted(infos.items())]
    layouts = layout_shards(entries, stem=_STEM, max_shard_bytes=_MAX_SHARD_BYTES, metadata=metadata.to_metadata())
    with BlockReader() as reader:
        for layout in layouts:
            with ShardWriter(staging / layout.filename, layout) as writer:
                for entry in layout.entries:
                    info = infos[entry.name]
                    for start in range(0, info.numel, _BLOCK):
                        block = reader.read_block(info, start, min(_BLOCK, info.numel - start))
                        writer.write(entry.name, start, block)
    names = [layout.filename for layout in layouts]
    if len(layouts) > 1:
        write_atomically(staging / index_name(_STEM), index_json(layouts))
        names.append(index_name(_STEM))
    return names


def check_written(staging: Path, trained: Trained) -> None:
    """Reads a finished sidecar back as a merge would.

    Raises:
        SidecarMismatchError: it does not belong to what it describes, which would be a fault of this library.
    """
    raise_together(
        check_sidecar(
            open_sidecar(staging),
            mean_tensors=trained.tensors,
            mean_fingerprint=trained.fingerprint,
            base_fingerprint=trained.base[1],
            adapter=trained.adapter,
        )
    )
