"""What a recipe calls a model, `model@revision+adapter@revision`, and the folder it means.

A model is a local folder or a repository of the Hugging Face hub. Downloads go through the hub's own cache,
but a branch or tag is looked up first: a cached commit never stands in silently for a newer one that could
not be reached.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mergekit_bayes.checkpoint.files import shown
from mergekit_bayes.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "preprocessor_config.json",
    "processor_config.json",
    "*.py",
]
_UNWANTED = ["*/*", "consolidated*", "*.fp16.safetensors"]  # other copies of the same weights


@dataclass(frozen=True)
class ModelReference:
    """A reference taken apart.

    Attributes:
        model: local folder or hub id of the model (or of an adapter on its own).
        revision: branch, tag or commit of the model; None for the hub's default branch.
        adapter: local folder or hub id of an adapter on that model.
        adapter_revision: branch, tag or commit of the adapter.
    """

    model: str
    revision: str | None
    adapter: str | None
    adapter_revision: str | None


@dataclass(frozen=True)
class ResolvedFolder:
    """Where a model or adapter lies.

    Attributes:
        path: the folder.
        revision: the commit it was downloaded at; None for a local folder.
    """

    path: Path
    revision: str | None


def parse_reference(reference: str, *, base_dir: Path | None = None) -> ModelReference:
    """Takes apart `path_or_hub_id[@revision][+adapter[@revision]]`.

    A `+` or `@` that belongs to the name of an existing local folder does not separate anything.

    Args:
        reference: as the recipe has it.
        base_dir: folder of the recipe; existing folders are looked for from the current directory, then
            from here.

    Raises:
        CheckpointError: a part is empty, or there is more than one way to take it apart.
    """
    marks = [index for index, character in enumerate(reference) if character == "+"]
    splits = [(reference, None), *((reference[:index], reference[index + 1 :]) for index in marks)]
    readings = []
    for model, adapter in splits:
        if _find_local(model, base_dir) and adapter is None:
            return ModelReference(model, None, None, None)
        parts = [_split_revision(part, base_dir) for part in (model, adapter) if part is not None]
        if None not in parts:
            readings.append(parts)
    if len(readings) != 1:
        how = "in more than one way" if readings else "in no way"
        expected = "expected model[@revision][+adapter[@revision]] with at most one + and one @ in each part"
        raise CheckpointError(f"{shown(reference)}: can be read {how}; {expected}")
    (model, revision), *rest = [part for part in readings[0] if part is not None]
    adapter, adapter_revision = rest[0] if rest else (None, None)
    return ModelReference(model, revision, adapter, adapter_revision)


def resolve(reference: str, revision: str | None, *, base_dir: Path) -> ResolvedFolder:
    """Finds the folder of a model or adapter, downloading it from the hub if it is not local.

    Args:
        reference: a path, relative to the current directory or else to `base_dir`, or a hub id.
        revision: branch, tag or commit on the hub.
        base_dir: folder of the recipe.

    Raises:
        CheckpointError: it is neither a folder nor reachable on the hub, or a revision is asked of a local
            folder.
    """
    found = _find_local(reference, base_dir)
    if found is not None:
        if revision is not None:
            seen = f"{shown(reference)}@{shown(revision)}: is the local folder {shown(found)}"
            raise CheckpointError(f"{seen}, which has no revisions; expected the path alone")
        return ResolvedFolder(found, None)
    if (file := _find_local(reference, base_dir, folder=False)) is not None:
        raise CheckpointError(f"{shown(file)}: is a file; expected the folder it lies in")
    looked = " and ".join(dict.fromkeys(shown(path) for path in _candidates(reference, base_dir)))
    if not _is_hub_id(reference):
        raise CheckpointError(f"{shown(reference)}: is no folder (looked for {looked}) and no hub id such as org/name")
    return _download(reference, revision, looked)


def _split_revision(part: str, base_dir: Path | None) -> tuple[str, str | None] | None:
    if _find_local(part, base_dir):
        return part, None
    name, mark, revision = part.partition("@")
    if not name or "+" in part or "@" in revision or (mark and not revision):
        return None
    return name, revision or None


def _candidates(reference: str, base_dir: Path | None) -> list[Path]:
    path = Path(reference)
    if reference.startswith("~"):
        with suppress(RuntimeError):  # a home that nobody has is an ordinary name
            path = path.expanduser()
    if path.is_absolute() or base_dir is None:
        return [path.absolute()]
    return [path.absolute(), base_dir.absolute() / path]


def _find_local(reference: str, base_dir: Path | None, *, folder: bool = True) -> Path | None:
    if not reference:
        return None
    try:
        paths = _candidates(reference, base_dir)
        return next((path for path in paths if (path.is_dir() if folder else path.exists())), None)
    except (OSError, ValueError):  # too long, or a NUL in it: no local folder
        return None


def _is_hub_id(reference: str) -> bool:
    return len(reference) <= 96 and ".." not in reference and _HUB_ID.fullmatch(reference) is not None


def _download(hub_id: str, revision: str | None, looked: str) -> ResolvedFolder:
    # imported here: it takes a third of a second that local merges and error messages need not wait for
    import huggingface_hub
    from huggingface_hub import constants

    asked = f"{hub_id}@{revision}" if revision else hub_id
    try:
        newest = None
        if not constants.HF_HUB_OFFLINE and not _COMMIT.fullmatch(revision or ""):
            newest = huggingface_hub.HfApi().model_info(hub_id, revision=revision, timeout=30).sha
        folder = huggingface_hub.snapshot_download(
            hub_id, revision=revision, allow_patterns=_WANTED, ignore_patterns=_UNWANTED
        )
    except Exception as error:  # the hub's client lets its HTTP library's own exceptions through
        lines = str(error).strip().splitlines() or [""]
        reason = f"{type(error).__name__}: {shown(lines[0])}"
        advice = "; set HF_HUB_OFFLINE=1 to use what the cache holds" if not constants.HF_HUB_OFFLINE else ""
        message = f"{shown(asked)}: is no folder (looked for {looked}) and cannot be had from the hub: {reason}"
        raise CheckpointError(f"{message}{advice}") from error
    path = Path(folder)
    if newest is not None and path.name != newest:
        seen = f"{shown(asked)}: the cache gave commit {shown(path.name)}"
        raise CheckpointError(
            f"{seen}; expected {shown(newest)}, the newest on the hub; run again when it is reachable"
        )
    return ResolvedFolder(path, path.name)
