"""Named tensors to one safetensors file and back: durable, the same bytes every time, no pickle, no memory map."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_bayes.checkpoint.dtypes import dtype_of
from mergekit_bayes.checkpoint.header import read_header
from mergekit_bayes.checkpoint.reader import BlockReader
from mergekit_bayes.checkpoint.writer import ShardWriter, TensorEntry, layout_shards
from mergekit_bayes.finetune.ivon.sharding import whole

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["bytes_of", "read_tensors", "send_tensors", "write_tensors"]


def bytes_of(tensors: Mapping[str, Tensor]) -> int:
    """Returns the bytes that the values take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a new file; one tensor at a time leaves an accelerator.

    Where tensors are spread over processes, the others call `send_tensors` meanwhile.

    Raises:
        OutputError: the disk has no room or failed.
    """
    entries = [TensorEntry(name, dtype_of(tensor), tuple(tensor.shape)) for name, tensor in sorted(tensors.items())]
    (layout,) = layout_shards(entries, stem=path.stem, max_shard_bytes=1 << 62)
    with ShardWriter(path, layout) as writer:
        for name, tensor in tensors.items():
            writer.write(name, 0, whole(tensor).cpu().contiguous().reshape(-1))


def send_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Gives this process's parts to the one that writes the same tensors."""
    for tensor in tensors.values():
        whole(tensor)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads a whole file.

    Raises:
        CheckpointError: it cannot be read or trusted.
    """
    with BlockReader() as reader:
        return {name: reader.read_tensor(info) for name, info in read_header(path).tensors.items()}
