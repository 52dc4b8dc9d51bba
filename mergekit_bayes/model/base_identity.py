"""The pretrained model on disk: found, checked before anything trusts it, and known by its fingerprint.

transformers loads a folder that leaves out a tensor, holds one twice, follows an index out of the folder or has int8
where a float should be, and says nothing or a line in a log. The folder is read by `mergekit_bayes.checkpoint` first,
which refuses all of these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from mergekit_bayes.checkpoint.adapter import is_adapter
from mergekit_bayes.checkpoint.dtypes import DTYPES
from mergekit_bayes.checkpoint.files import shown
from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.checkpoint.index import Checkpoint, open_checkpoint
from mergekit_bayes.checkpoint.reader import BlockReader
from mergekit_bayes.checkpoint.reference import parse_reference, resolve
from mergekit_bayes.checkpoint.shards import raise_together
from mergekit_bayes.errors import CheckpointError, ModelError, NonFiniteError

_BLOCK = 1 << 24  # elements


@dataclass(frozen=True)
class BaseIdentity:
    """What training started from, as the files it leaves behind name it.

    Attributes:
        path: as PEFT finds it: a hub id, or a folder, relative to the current directory if the recipe had it so.
        revision: the commit of a hub model; None for a folder.
        fingerprint: of its weights; an adapter or sidecar that records it is refused on another base.
        fresh: starting values of tensors that the base has not, such as those of a new classification head, by their
            name in the full model; float32, on CPU.
    """

    path: str
    revision: str | None
    fingerprint: str
    fresh: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)


def open_base(reference: str, *, recipe_dir: Path | None = None) -> tuple[Checkpoint, BaseIdentity]:
    """Finds a base and reads its headers.

    Args:
        reference: a folder or hub id, with `@revision` as wanted.
        recipe_dir: folder of the recipe; relative paths are tried from the current directory first, then from here.

    Raises:
        CheckpointError: it is not there, or cannot be trusted.
        PlanError: several such reasons.
        ModelError: it is an adapter, or has one.
    """
    here = Path() if recipe_dir is None else recipe_dir
    parsed = parse_reference(reference, base_dir=here)
    if parsed.adapter is not None:
        raise _adapted(reference)
    folder = resolve(parsed.model, parsed.revision, base_dir=here)
    if is_adapter(folder.path):
        raise _adapted(reference)
    checkpoint = open_checkpoint(folder.path, reference=reference, revision=folder.revision)
    raise_together(list(_codes(checkpoint)))
    path = parsed.model if folder.revision is not None else _as_found_from_here(parsed.model, folder.path, here)
    return checkpoint, BaseIdentity(path, folder.revision, fingerprint(checkpoint.tensors))


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating type that most of the checkpoint's values have; float32 for those stored as float64."""
    elements: Counter[str] = Counter()
    for info in checkpoint.tensors.values():
        if info.floating:
            elements[info.dtype] += info.numel
    if not elements:
        raise CheckpointError(
            f"{shown(checkpoint.folder)}: holds no tensor of floating point numbers; expected weights"
        )
    most = max(elements, key=lambda name: (elements[name], DTYPES[name].itemsize))
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(most, torch.float32)


def check_finite(model: torch.nn.Module, checkpoint: Checkpoint, *, quantised: bool) -> None:
    """Refuses weights that are NaN or infinite.

    Args:
        model: as loaded; float16 may have overflowed what the file holds.
        checkpoint: the file, which is read again where the model holds codes or left weights on disk.
        quantised: whether it does.

    Raises:
        NonFiniteError: naming the first tensor, and the share of its values.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            _refuse_non_finite(parameter.detach(), f"{shown(checkpoint.reference)}: {shown(name)}")
    if not quantised and not any(parameter.is_meta for parameter in model.parameters()):
        return
    with BlockReader() as reader:
        for info in checkpoint.tensors.values():
            for start in range(0, info.numel if info.floating else 0, _BLOCK):
                block = reader.read_block(info, start, min(_BLOCK, info.numel - start))
                _refuse_non_finite(block, f"{shown(info.path)}: {shown(info.name)}")


def _refuse_non_finite(values: Tensor, where: str) -> None:
    if values.numel() == 0 or values.is_meta:
        return
    low, high = torch.aminmax(values)
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        bad = int((~values.isfinite()).sum())
        seen = f"{where}: {bad} of {values.numel()} values are NaN or infinite as {values.dtype}"
        raise NonFiniteError(f"{seen}; expected finite weights, or a dtype that can hold them")


def _adapted(reference: str) -> ModelError:
    return ModelError(
        f"model {shown(reference)}: is or has a PEFT adapter; expected a full model to train from; merge the adapter "
        "into its base first (bayes-merge with space: full)"
    )


def _codes(checkpoint: Checkpoint) -> Iterator[CheckpointError]:
    """Weights whose values are not the numbers they stand for: integers, or 8-bit floats without their scales."""
    for info in checkpoint.tensors.values():
        if not info.floating and (info.dtype.startswith("F8") or _is_weight(info)):
            yield CheckpointError(
                f"{shown(info.path)}: tensor {shown(info.name)}: its dtype is {info.dtype}; expected a float type; "
                "dequantise the model and save it again"
            )


def _is_weight(info: TensorInfo) -> bool:
    # GPT-2's causal mask is called `attn.bias` too, but has four dimensions
    return info.name.endswith(".weight") or (info.name.endswith(".bias") and len(info.shape) == 1)


def _as_found_from_here(written: str, folder: Path, recipe_dir: Path) -> str:
    """The folder's path as the recipe has it, if that leads there from the current directory, where PEFT looks."""
    for candidate in (Path(written), recipe_dir / written):
        if candidate.is_dir():
            return written if candidate == Path(written) else str(candidate)
    return str(folder)
