"""Tiny checkpoints, adapters and sidecars written tensor by tensor, and folders read back.

Whatever a merge may meet on disk is a few lines here: no transformers, no PEFT, every value chosen by the test.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_bayes.checkpoint.adapter import is_adapter, open_adapter
from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.checkpoint.index import open_checkpoint
from mergekit_bayes.checkpoint.initial import FRESH_NAME
from mergekit_bayes.checkpoint.sidecar import SidecarMetadata, open_sidecar, write_sidecar
from mergekit_bayes.checkpoint.sidecar_metadata import METADATA_KEY

Tensors = Mapping[str, Tensor]

CONFIG: Mapping[str, Any] = {"architectures": ["ToyModel"], "model_type": "toy", "tie_word_embeddings": False}
PREFIX = "base_model.model."


def random_tensors(
    seed: int, shapes: Mapping[str, Sequence[int]], *, dtype: torch.dtype = torch.float32, scale: float = 1.0
) -> dict[str, Tensor]:
    """Normal values of standard deviation `scale`."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (scale * torch.randn(tuple(shape), generator=generator, dtype=torch.float64)).to(dtype)
        for name, shape in shapes.items()
    }


def random_precisions(
    seed: int, shapes: Mapping[str, Sequence[int]], *, above: float = 0.0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """`above` plus log-normal values, spread over two orders of magnitude."""
    logs = random_tensors(seed, shapes, dtype=torch.float64)
    return {name: (above + values.exp()).to(dtype) for name, values in logs.items()}


def write_checkpoint(
    folder: Path, tensors: Tensors, *, config: Mapping[str, Any] | None = None, shards: int = 1
) -> Path:
    """A model folder; with `shards` > 1, that many files and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    _write_tensors(folder, "model", tensors, shards)
    return folder


def _write_tensors(folder: Path, stem: str, tensors: Tensors, shards: int) -> None:
    whole = {name: tensor.contiguous().clone() for name, tensor in sorted(tensors.items())}
    if shards == 1:
        save_file(whole, folder / f"{stem}.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: whole[name] for name in list(whole)[shard::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in whole.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def write_adapter(
    folder: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    *,
    alpha: float | None = None,
    saved: Tensors | None = None,
    embeddings: Sequence[str] = (),
    base: Path | None = None,
    told: Mapping[str, Any] | None = None,
    **config: Any,
) -> Path:
    """A PEFT adapter folder.

    Args:
        folder: where to write.
        factors: A and B by the path of the module; all of one rank, unless `config` has a rank_pattern.
        alpha: lora_alpha; the rank (so that the scaling is 1) unless given.
        saved: tensors stored whole, by the name of the base tensor.
        embeddings: the modules among `factors` that are embeddings.
        base: goes into `base_model_name_or_path`.
        told: what the header says about the adapter, as training writes it.
        config: further keys of adapter_config.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank = next((a.shape[0] for a, _ in factors.values()), 1)
    tensors = {f"{PREFIX}{name}": tensor.clone() for name, tensor in (saved or {}).items()}
    for name, (a, b) in factors.items():
        keys = ("lora_embedding_A", "lora_embedding_B") if name in embeddings else ("lora_A.weight", "lora_B.weight")
        for key, factor in zip(keys, (a, b), strict=True):
            tensors[f"{PREFIX}{name}.{key}"] = factor.contiguous().clone()
    save_file(tensors, folder / "adapter_model.safetensors", metadata=_metadata(told))
    content = {
        "peft_type": "LORA",
        "base_model_name_or_path": None if base is None else str(base),
        "r": rank,
        "lora_alpha": rank if alpha is None else alpha,
        "target_modules": sorted({name.rpartition(".")[2] for name in factors}),
        "bias": "none",
        "task_type": None,
        "fan_in_fan_out": False,
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(content))
    return folder


def write_initial(folder: Path, tensors: Tensors, *, base: Path | None = None) -> Path:
    """What new modules started from, beside the model or adapter in `folder`; `base` goes into the header."""
    told = None if base is None else {"base_fingerprint": fingerprint(tensor_infos(base))}
    file = folder / FRESH_NAME
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, file, metadata=_metadata(told))
    return file


def _metadata(told: Mapping[str, Any] | None) -> dict[str, str]:
    return {"format": "pt", **({} if told is None else {METADATA_KEY: json.dumps(told)})}


def tensor_infos(folder: Path) -> Mapping[str, TensorInfo]:
    """The tensors a sidecar of this folder describes."""
    return open_adapter(folder).tensors if is_adapter(folder) else open_checkpoint(folder).tensors


def write_precisions(
    folder: Path,
    precisions: Tensors,
    *,
    base: Path | None = None,
    to: Path | None = None,
    shards: int = 1,
    **metadata: Any,
) -> Path:
    """A sidecar that belongs to the checkpoint or adapter in `folder`, with `estimator="fisher"` unless given.

    Args:
        folder: the model it describes.
        precisions: by tensor name; for an adapter by the raw names of its file.
        base: whose fingerprint goes into the metadata.
        to: another file to write it to.
        shards: number of files.
        metadata: further fields of `SidecarMetadata`.
    """
    facts: dict[str, Any] = {
        "family": "diagonal",
        "estimator": "fisher",
        "space": "factor" if is_adapter(folder) else "full",
        "mean_fingerprint": fingerprint(tensor_infos(folder)),
        "base_fingerprint": None if base is None else fingerprint(tensor_infos(base)),
    }
    described = SidecarMetadata(**{**facts, **metadata})
    if shards == 1:
        return write_sidecar(folder if to is None else to, precisions, described)
    _write_tensors(folder, "precision", precisions, shards)
    for file in folder.glob("precision-*.safetensors"):
        save_file(load_file(file), file, metadata=described.to_metadata())
    return folder / "precision.safetensors.index.json"


def factor_names(module: str) -> tuple[str, str]:
    """Names of A and B of a linear module in an adapter's file."""
    return f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"


def read_tensors(folder: Path, stem: str = "model") -> dict[str, Tensor]:
    """All tensors of `model*.safetensors` (or another stem) by name."""
    files = sorted(folder.glob(f"{stem}.safetensors")) or sorted(folder.glob(f"{stem}-*-of-*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def read_precisions(folder: Path) -> dict[str, Tensor]:
    """All precisions of a folder by tensor name."""
    return read_tensors(folder, "precision")


def read_metadata(folder: Path) -> SidecarMetadata:
    """What the sidecar of a folder says about itself."""
    return open_sidecar(folder).metadata


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text())


def snapshot(root: Path) -> dict[str, tuple[object, ...]]:
    """Every path below `root` with mode, time of change and content: equal snapshots, nothing touched."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = ""
        if path.is_symlink():
            content = os.readlink(path)  # noqa: PTH115  (a text, also where it leads nowhere)
        elif path.is_file() and os.access(path, os.R_OK):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        # the time of a folder changes when something in it was made and removed again, which is allowed
        time = 0 if path.is_dir() and not path.is_symlink() else status.st_mtime_ns
        found[str(path.relative_to(root))] = (status.st_mode, time, content)
    return found
