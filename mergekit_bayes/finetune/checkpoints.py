"""A run that can go on: one folder per checkpoint, whole or not there at all.

    checkpoints/checkpoint-120/
        trainable.safetensors   the trainable parameters, by the model's own names
        optimizer.safetensors   tensors of the optimizer's state
        log.jsonl               the log so far
        checkpoint.json         everything else, and the size and digest of the files above; written last

The folder is written under another name, synchronised, and renamed. Nothing is pickled. Random numbers, learning rate
and order of the data are functions of the step and need not be saved.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_bayes.checkpoint.disk import disk_errors, sync_folder, sync_tree, write_atomically
from mergekit_bayes.checkpoint.files import brief, shown
from mergekit_bayes.errors import CheckpointError, MergekitBayesError
from mergekit_bayes.finetune.tensors import read_tensors, send_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Checkpoint", "find_checkpoints", "load_checkpoint", "name_of", "send_checkpoint", "write_checkpoint"]

FORMAT = "mergekit_bayes.checkpoint"
VERSION = 1
MARKER = "checkpoint.json"
_NAME = re.compile(r"checkpoint-(\d{1,12})")
_TRAINABLE, _OPTIMIZER, _LOG = "trainable.safetensors", "optimizer.safetensors", "log.jsonl"


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after a step.

    Attributes:
        step: optimizer steps taken.
        trainable: trainable parameters by name; while a run is under way they may be spread over processes, and so may
            the optimizer's tensors.
        optimizer: `state_dict` of the optimizer.
        log: text of the log so far.
        state: everything else; what JSON can hold.
    """

    step: int
    trainable: Mapping[str, Tensor]
    optimizer: Mapping[str, Any]
    log: str
    state: Mapping[str, Any]


def name_of(step: int) -> str:
    """Returns the name of a checkpoint's folder."""
    return f"checkpoint-{step}"


def find_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """Returns step and folder of every checkpoint with a marker, oldest first; it may still be damaged."""
    if not folder.is_dir():
        return []
    matches = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted((int(match[1]), path) for match, path in matches if (path / MARKER).is_file())


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> list[Path]:
    """Writes a checkpoint below `folder`; one of the same step that stands there is replaced.

    Args:
        folder: holds the checkpoints of the run; need not exist.
        checkpoint: what to write.

    Returns:
        Its files.

    Raises:
        OutputError: the disk has no room or failed; nothing is left of this one, and the others are as they were.
    """
    target = folder / name_of(checkpoint.step)
    fresh = folder / f".{target.name}.new"
    try:
        with disk_errors(fresh, "create"):
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir(parents=True)
        _fill(fresh, checkpoint)
        with disk_errors(target, "put in place"):
            if target.exists():
                shutil.rmtree(target)
            fresh.rename(target)
            sync_folder(folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return sorted(target.iterdir())


def send_checkpoint(checkpoint: Checkpoint) -> None:
    """Gives this process's parts of the tensors to the one that writes the same checkpoint."""
    send_tensors(checkpoint.trainable)
    send_tensors(_split(checkpoint.optimizer)[1])


def _fill(folder: Path, checkpoint: Checkpoint) -> None:
    scalars, tensors = _split(checkpoint.optimizer)
    write_tensors(folder / _TRAINABLE, checkpoint.trainable)
    write_tensors(folder / _OPTIMIZER, tensors)
    write_atomically(folder / _LOG, checkpoint.log.encode())
    content = {
        "format": FORMAT,
        "version": VERSION,
        "step": checkpoint.step,
        "files": {name: _identity(folder / name) for name in (_TRAINABLE, _OPTIMIZER, _LOG)},
        "optimizer": scalars,
        "state": checkpoint.state,
    }
    write_atomically(folder / MARKER, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())
    with disk_errors(folder, "synchronise"):
        sync_tree(folder)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads a checkpoint and makes sure that it is whole.

    Raises:
        CheckpointError: it is no checkpoint of this library, of another version, or damaged; the message says which.
    """
    content = _marker(folder)
    for name, identity in content["files"].items():
        if name not in (_TRAINABLE, _OPTIMIZER, _LOG):
            raise CheckpointError(f"{shown(folder / MARKER)}: names the file {shown(name)}; expected none such")
        if not (folder / name).is_file() or _identity(folder / name) != identity:
            expected = f"expected the {identity['bytes']:,} bytes that were written"
            raise CheckpointError(f"{shown(folder / name)}: is missing or damaged; {expected}")
    with disk_errors(folder / _LOG, "read"):
        log = (folder / _LOG).read_text(encoding="utf-8")
    optimizer = _join(content["optimizer"], read_tensors(folder / _OPTIMIZER))
    return Checkpoint(content["step"], read_tensors(folder / _TRAINABLE), optimizer, log, content["state"])


def _marker(folder: Path) -> dict[str, Any]:
    path = folder / MARKER
    if not path.is_file():
        raise CheckpointError(f"{shown(folder)}: is no checkpoint of a run; expected a folder with {MARKER}")
    try:
        content = json.loads(path.read_bytes())
        known = content["format"] == FORMAT
        version, _ = content["version"], [content[key] for key in ("step", "files", "optimizer", "state")]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{shown(path)}: cannot be read as the marker of a checkpoint: {error}") from error
    if not known or version != VERSION:
        seen = f"{shown(path)}: format {brief(content['format'])}, version {brief(version)}"
        raise CheckpointError(f"{seen}; expected {FORMAT}, version {VERSION}")
    return dict(content)


def _identity(path: Path) -> dict[str, object]:
    digest, size = blake2b(digest_size=16), 0
    with disk_errors(path, "read"), path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "blake2b": digest.hexdigest()}


def _split(state_dict: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An optimizer's state as plain data and as tensors named `<parameter>.<key>`."""
    import torch

    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, entries in state_dict["state"].items():
        scalars[str(index)] = {}
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{key}"] = value
            else:
                scalars[str(index)][key] = value
    return {"state": scalars, "param_groups": state_dict["param_groups"]}, tensors


def _join(scalars: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(index): dict(entries) for index, entries in scalars["state"].items()}
    for name, tensor in tensors.items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = tensor
    return {"state": state, "param_groups": [_group(group) for group in scalars["param_groups"]]}


def _group(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group as it was: JSON knows no tuples, and torch's own optimizers have pairs of betas."""
    return {key: tuple(value) if key == "betas" else value for key, value in group.items()}


def newest_whole(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Returns the newest checkpoint that is whole, and what is wrong with newer ones."""
    faults: list[str] = []
    for path in _newest_first(folder):
        try:
            return load_checkpoint(path), faults
        except MergekitBayesError as error:
            faults.append(str(error))
    return None, faults


def _newest_first(folder: Path) -> Iterator[Path]:
    return (path for _, path in reversed(find_checkpoints(folder)))
