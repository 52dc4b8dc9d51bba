"""The safetensors files of one folder: a single file, or an index and the shards it names, telling one story.

Loaders in use today take the last of two tensors with one name, follow an index out of its folder, and prefer
whichever of two contradictory files they meet first. Here every contradiction is a fault, and all faults of a
folder are found in one pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergekit_bayes.checkpoint.files import brief, contained, listed, read_json, shown
from mergekit_bayes.checkpoint.header import Header, read_header
from mergekit_bayes.errors import CheckpointError, PlanError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclass(frozen=True)
class _Index:
    path: Path
    weight_map: Mapping[str, str]
    total_size: object


def open_shards(folder: Path, stem: str, problems: list[CheckpointError]) -> list[Header]:
    """Reads the headers of `<stem>.safetensors`, or of the shards that `<stem>.safetensors.index.json` names.

    Args:
        folder: where they lie.
        stem: `model`, or `precision` for a sidecar.
        problems: receives every fault found.

    Returns:
        The headers in the order of the file names; not to be used if this added to `problems`.
    """
    known = len(problems)
    single, index_file = f"{stem}.safetensors", f"{stem}.safetensors.index.json"
    try:
        check_folder(folder)
        present = {path.name for path in folder.iterdir()}
        index = _read_index(folder, index_file, problems) if index_file in present else None
        if index is None and single not in present:
            raise CheckpointError(_nothing_found(folder, stem, present))
        names = sorted(set(index.weight_map.values())) if index else [single]
        _find_leftovers(folder, stem, present, names, problems)
        headers = _read_headers(folder, names, problems)
        if len(problems) == known:
            _compare(folder, headers, index, problems)
    except CheckpointError as error:
        problems.append(error)
        return []
    return headers


def check_folder(folder: Path) -> None:
    """Checks that a path is a folder that can be listed.

    Raises:
        CheckpointError: it is not.
    """
    try:
        next(folder.iterdir(), None)
    except FileNotFoundError:
        raise CheckpointError(f"{shown(folder)}: does not exist; expected a folder") from None
    except NotADirectoryError:
        raise CheckpointError(f"{shown(folder)}: is a file; expected the folder it lies in") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{shown(folder)}: cannot be listed: {reason}") from error


def raise_together(problems: Sequence[CheckpointError]) -> None:
    """Raises the one problem as it is, several as a `PlanError`, and nothing if there are none.

    Raises:
        CheckpointError: the only problem.
        PlanError: all of them.
    """
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise PlanError(problems)


def _read_index(folder: Path, name: str, problems: list[CheckpointError]) -> _Index:
    path = contained(folder, name)
    content = read_json(path)
    metadata, weight_map = content.get("metadata"), content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        seen = f"{shown(path)}: its weight_map is {brief(weight_map)}"
        raise CheckpointError(f"{seen}; expected an object from tensors to files")
    if not isinstance(metadata, dict):
        seen = f"{shown(path)}: its metadata is {brief(metadata)}"
        problems.append(CheckpointError(f"{seen}; expected an object with the total_size of all tensors"))
        metadata = {}
    tensors_by_shard: dict[str, list[str]] = {}
    for tensor, shard in weight_map.items():
        key = shard if isinstance(shard, str) else brief(shard)
        tensors_by_shard.setdefault(key, []).append(tensor)
    faults = [fault for item in tensors_by_shard.items() if (fault := _shard_fault(path, *item))]
    if faults:
        problems.extend(faults[:-1])
        raise faults[-1]
    return _Index(path, weight_map, metadata.get("total_size"))


def _shard_fault(path: Path, shard: str, tensors: list[str]) -> CheckpointError | None:
    where = f"{shown(path)}: weight_map[{shown(tensors[0])}]"
    if not shard.endswith(".safetensors"):
        return CheckpointError(f"{where} is {shown(shard)}; expected the name of a .safetensors file")
    try:
        if not contained(path.parent, shard).exists():
            seen = f"{where} is {shown(shard)}, which is missing"
            return CheckpointError(f"{seen}; expected a file with {len(tensors)} tensors")
    except CheckpointError as error:
        return CheckpointError(f"{where}: {error}")
    return None


def _find_leftovers(
    folder: Path, stem: str, present: Iterable[str], used: Sequence[str], problems: list[CheckpointError]
) -> None:
    ours = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?\.safetensors")
    unused = sorted(name for name in present if ours.fullmatch(name) and name not in used)
    if unused:
        seen = f"{shown(folder)}: holds {listed(unused)} beside {listed(used)}"
        advice = "perhaps left over from another save; remove what does not belong to this model"
        problems.append(CheckpointError(f"{seen}, {advice}"))


def _read_headers(folder: Path, names: Iterable[str], problems: list[CheckpointError]) -> list[Header]:
    headers = []
    for name in names:
        try:
            headers.append(read_header(contained(folder, name)))
        except CheckpointError as error:
            problems.append(error)
    return headers


def _compare(folder: Path, headers: Sequence[Header], index: _Index | None, problems: list[CheckpointError]) -> None:
    files: dict[str, list[str]] = {}
    for header in headers:
        for name in header.tensors:
            files.setdefault(name, []).append(header.path.name)
    if not files:
        raise CheckpointError(f"{shown(folder)}: holds no tensors in {listed([h.path.name for h in headers])}")
    weight_map = index.weight_map if index else {name: found[0] for name, found in files.items()}
    faults: dict[str, list[str]] = {}
    for name in sorted(files.keys() | weight_map.keys()):
        if fault := _placement_fault(files.get(name, []), weight_map.get(name)):
            faults.setdefault(fault, []).append(name)
    for fault, names in faults.items():
        problems.append(CheckpointError(f"{shown(folder)}: {fault}: {listed(names)}"))
    if index and not faults:
        _compare_size(index, headers, problems)


def _placement_fault(found: list[str], expected: str | None) -> str | None:
    if len(found) > 1:
        return f"stored twice, in {' and '.join(map(shown, found))}; expected each tensor in one file"
    if not found:
        return f"named by the weight_map but missing from {shown(expected or '')}"
    if expected is None:
        return f"stored in {shown(found[0])} but missing from the weight_map"
    if found[0] != expected:
        return f"stored in {shown(found[0])}; the weight_map expects {shown(expected)}"
    return None


def _compare_size(index: _Index, headers: Sequence[Header], problems: list[CheckpointError]) -> None:
    stored = sum(info.nbytes for header in headers for info in header.tensors.values())
    if index.total_size is not None and index.total_size != stored:
        seen = f"{shown(index.path)}: its total_size is {brief(index.total_size)}"
        advice = "the index may belong to another save; correct or remove metadata.total_size"
        problems.append(CheckpointError(f"{seen}; expected {stored}, the bytes of all tensors; {advice}"))


def _nothing_found(folder: Path, stem: str, present: Iterable[str]) -> str:
    expected = f"expected {stem}.safetensors or {stem}.safetensors.index.json"
    if "adapter_config.json" in present:
        return f"{shown(folder)}: is a PEFT adapter, not a model; {expected}, or `model+adapter`"
    if others := sorted(n for n in present if n.endswith(".safetensors") and not n.startswith("precision")):
        return f"{shown(folder)}: holds {listed(others)}; {expected}"
    if pickles := sorted(name for name in present if name.endswith(_PICKLES)):
        seen = f"{shown(folder)}: holds only pickles ({listed(pickles)}), which can run code when loaded"
        return f"{seen}; {expected}; load it where you trust it and save it again with save_pretrained"
    return f"{shown(folder)}: holds no weights; {expected}"
