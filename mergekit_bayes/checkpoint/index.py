"""A model folder: its configuration and every tensor it holds, known from JSON and headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from mergekit_bayes.checkpoint.files import brief, contained, read_json, shown
from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.checkpoint.shards import check_folder, open_shards, raise_together
from mergekit_bayes.errors import CheckpointError

_CONFIG_FILE = "config.json"
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, known by its headers.

    Attributes:
        reference: what the user called it.
        folder: where it lies.
        tensors: every stored tensor, sorted by name. A tied weight is stored once, hence listed once.
        config: the parsed `config.json`.
        files: the safetensors files, sorted by name.
        revision: the commit it was downloaded at; None for a local folder.
    """

    reference: str
    folder: Path
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, object]
    files: tuple[Path, ...]
    revision: str | None


def open_checkpoint(folder: Path, *, reference: str | None = None, revision: str | None = None) -> Checkpoint:
    """Opens a model folder: reads `config.json`, the index and the headers, and no tensor.

    Args:
        folder: holds `config.json` and either `model.safetensors` or an index and its shards.
        reference: how messages and reports call the model; the folder's path if not given.
        revision: the commit the folder was downloaded at, if any.

    Raises:
        CheckpointError: the folder cannot be read or trusted, for one reason.
        PlanError: the same, for several reasons, all of them listed.
    """
    check_folder(folder)
    problems: list[CheckpointError] = []
    headers = open_shards(folder, "model", problems)
    config = _read_config(folder, problems)
    raise_together(problems)
    tensors = {name: info for header in headers for name, info in header.tensors.items()}
    return Checkpoint(
        reference=str(folder) if reference is None else reference,
        folder=folder,
        tensors=MappingProxyType(dict(sorted(tensors.items()))),
        config=MappingProxyType(config),
        files=tuple(header.path for header in headers),
        revision=revision,
    )


def _read_config(folder: Path, problems: list[CheckpointError]) -> dict[str, object]:
    try:
        path = contained(folder, _CONFIG_FILE)
        if not path.exists():
            raise CheckpointError(f"{shown(path)}: is missing; expected a transformers model folder")
        config = read_json(path)
        _refuse_quantized(path, config)
    except CheckpointError as error:
        problems.append(error)
        return {}
    return config


def _refuse_quantized(path: Path, config: Mapping[str, object]) -> None:
    parts = {"": config, **{f"{key}.": part for key, part in config.items() if isinstance(part, dict)}}
    for prefix, part in parts.items():
        for key in _QUANTIZATION_KEYS:
            if part.get(key):
                seen = f"{shown(path)}: {shown(prefix + key)} is {brief(part[key])}"
                expected = "expected plain weights, not quantised codes; dequantise the model and save it again"
                raise CheckpointError(f"{seen}; {expected}")
