"""Tensors in memory to one file and back, whole: for states of work, which are small beside what they are about."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bayes.checkpoint.dtypes import dtype_of
from mergekit_bayes.checkpoint.header import read_header
from mergekit_bayes.checkpoint.reader import BlockReader
from mergekit_bayes.checkpoint.writer import ShardWriter, TensorEntry, layout_shards

if TYPE_CHECKING:
    import torch

__all__ = ["read_tensors", "write_tensors"]


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors to a safetensors file, in the order of their names: equal tensors, equal bytes.

    Raises:
        OutputError: the disk has no room or failed; the file is not there then.
    """
    entries = [TensorEntry(name, dtype_of(tensor), tuple(tensor.shape)) for name, tensor in sorted(tensors.items())]
    (layout,) = layout_shards(entries, stem=path.stem, max_shard_bytes=1 << 62, metadata={})
    with ShardWriter(path, layout) as writer:
        for entry in layout.entries:
            writer.write(entry.name, 0, tensors[entry.name].detach().cpu().contiguous().reshape(-1))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Returns every tensor of a safetensors file by name, on CPU.

    Raises:
        CheckpointError: the file cannot be read or trusted.
    """
    with BlockReader() as reader:
        return {name: reader.read_tensor(info) for name, info in read_header(path).tensors.items()}
