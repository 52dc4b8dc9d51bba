"""Whether the weights in memory are those that precisions were estimated for.

Precisions of another run fit in names and shapes and give plausible, wrong predictions. Where the described weights lie
beside the sidecar, a few blocks of each are compared with memory; the base of an adapter is compared by fingerprint
where its folder is known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_bayes.checkpoint.files import listed
from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.index import open_checkpoint
from mergekit_bayes.checkpoint.reader import BlockReader
from mergekit_bayes.checkpoint.sidecar import check_base
from mergekit_bayes.errors import CheckpointError, SidecarMismatchError
from mergekit_bayes.predict.precisions import Precisions

__all__ = ["foreign_base", "foreign_weights"]

_BLOCK = 128
_BLOCKS = 8
_NARROW = (torch.bfloat16, torch.float16)


def foreign_weights(precisions: Precisions, parameters: Mapping[str, nn.Parameter]) -> Iterator[SidecarMismatchError]:
    """Names the parameters whose values are not those that the precisions describe.

    Args:
        precisions: with their means on disk; without them there is nothing to compare.
        parameters: by the names of the precisions.
    """
    other = [name for name, parameter in sorted(parameters.items()) if not _same(precisions, name, parameter.detach())]
    if other:
        yield SidecarMismatchError(
            f"{precisions.where}: describes other values of {listed(other)} than the model holds; expected the model "
            "as it was saved there; was it trained further, pruned or loaded from elsewhere? If on purpose, give the "
            "precisions as a mapping: read_precisions(path)"
        )


def foreign_base(precisions: Precisions, model: nn.Module, adapter: str | None) -> list[SidecarMismatchError]:
    """Compares the base that an adapter's sidecar records with the folder the model's base was loaded from.

    Returns:
        The disagreement; empty if there is none or the folder is not known.
    """
    if precisions.sidecar is None or adapter is None:
        return []
    folder = _base_folder(model, adapter)
    if folder is None or precisions.sidecar.metadata.base_fingerprint is None:
        return []
    try:
        base = open_checkpoint(folder)
    except CheckpointError:  # quantised on disk, for example: nothing that a fingerprint was taken of
        return []
    return check_base(precisions.sidecar, fingerprint(base.tensors))


def _base_folder(model: nn.Module, adapter: str) -> Path | None:
    settings: Any = getattr(model, "peft_config", {}).get(adapter)
    own = getattr(getattr(model, "config", None), "_name_or_path", None)
    for name in (own, getattr(settings, "base_model_name_or_path", None)):
        if name and (Path(name) / "config.json").exists():
            return Path(name)
    return None


def _same(precisions: Precisions, name: str, held: Tensor) -> bool:
    info = precisions.means_on_disk.get(name)
    if info is None:
        return True
    flat = held.reshape(-1)
    with BlockReader() as reader:
        for start in _starts(info.numel):
            stored = reader.read_block(info, start, min(_BLOCK, info.numel - start))
            if not _equal(stored, flat[start : start + len(stored)].cpu()):
                return False
    return True


def _starts(numel: int) -> list[int]:
    if numel <= _BLOCK * _BLOCKS:
        return list(range(0, numel, _BLOCK))
    return [(numel - _BLOCK) * block // (_BLOCKS - 1) for block in range(_BLOCKS)]


def _equal(stored: Tensor, held: Tensor) -> bool:
    """Whether they are equal, apart from types the weights may have passed through on their way."""
    return any(torch.equal(stored.to(through).to(held.dtype), held) for through in (held.dtype, *_NARROW))
