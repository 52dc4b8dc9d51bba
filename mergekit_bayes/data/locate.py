"""Where the rows of a data set lie: local files of one kind, a folder saved by `datasets`, or the hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from mergekit_bayes.checkpoint.files import listed, shown
from mergekit_bayes.errors import DataError

if TYPE_CHECKING:
    from mergekit_bayes.recipe.data import DatasetSpec

KINDS = ("jsonl", "json", "csv", "tsv", "parquet", "txt")
"""What local files may be, by the ends of their names; each also with `.gz` behind, parquet without."""

_EXPECTED = ", ".join(f".{kind}" for kind in KINDS)
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
# files that lie beside data and are none
_BESIDE = re.compile(
    r"(readme|licen[cs]e|notice|copying|authors|requirements|dataset_infos?|dataset_dict|state|config)\b.*"
)
# the words by which `datasets` knows the splits of a folder
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


@dataclass(frozen=True)
class LocalFiles:
    """Files of one kind.

    Attributes:
        kind: one of `KINDS`.
        paths: the files, sorted.
        beside: files of the folder that are not read.
    """

    kind: str
    paths: tuple[Path, ...]
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class SavedFolder:
    """A folder that `Dataset.save_to_disk` wrote."""

    path: Path


@dataclass(frozen=True)
class HubDataset:
    """A data set of the hub, at a branch, tag or commit if there is one."""

    name: str
    revision: str | None


def locate(spec: DatasetSpec, recipe_dir: Path | None) -> LocalFiles | SavedFolder | HubDataset:
    """Finds a data set; nothing but names is read.

    Args:
        spec: its entry in the recipe.
        recipe_dir: where relative paths may start beside the current directory.

    Raises:
        DataError: it is neither there nor can it be a hub id, or the entry asks for what it has not.
    """
    found = find(spec.path, recipe_dir)
    if found is None:
        return _on_hub(spec, recipe_dir)
    if spec.name is not None:
        raise DataError(f"{shown(found)}: is local and has no configurations; expected no `name`")
    if found.is_dir():
        return _in_folder(spec, found)
    kind = kind_of(found)
    if kind is None:
        raise DataError(f"{shown(found)}: is no kind of file that is read here; expected {_EXPECTED}")
    if spec.split != "train":
        raise DataError(f"{shown(found)}: is one file, which has no split {shown(spec.split)}; expected no `split`")
    return LocalFiles(kind, (found,))


def find(path: str, recipe_dir: Path | None) -> Path | None:
    """The file or folder a path means: from the current directory, else from the recipe's; None if there is none."""
    start = Path(path)
    if path.startswith("~"):
        with suppress(RuntimeError):  # a home that nobody has is an ordinary name
            start = start.expanduser()
    places = [start, recipe_dir / start] if recipe_dir is not None else [start]
    for place in places:
        with suppress(OSError, ValueError):  # too long, or a NUL in it: not there
            if place.exists():
                return place.absolute()
    return None


def kind_of(path: PurePath) -> str | None:
    """The kind of a file by its name; None if it is none of `KINDS`."""
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    kind = PurePath(plain).suffix.removeprefix(".")
    return kind if kind in KINDS and (kind != "parquet" or plain == name) else None


def _on_hub(spec: DatasetSpec, recipe_dir: Path | None) -> HubDataset:
    name, mark, revision = spec.path.partition("@")
    named_like_a_file = kind_of(PurePath(spec.path)) is not None
    if (
        named_like_a_file
        or len(name) > 96
        or not _HUB_ID.fullmatch(name)
        or ".." in name
        or bool(mark) != bool(revision)
    ):
        places = [Path(spec.path).absolute()]
        if recipe_dir is not None:
            places.append((recipe_dir / spec.path).absolute())
        looked = " and ".join(dict.fromkeys(map(shown, places)))
        raise DataError(
            f"{shown(spec.path)}: there is no such file (looked for {looked}); expected a {_EXPECTED} file, a folder "
            "of such files, or a hub id such as org/name"
        )
    return HubDataset(name, revision or None)


def _in_folder(spec: DatasetSpec, folder: Path) -> LocalFiles | SavedFolder:
    if (folder / "dataset_dict.json").is_file():
        if not (folder / spec.split / "state.json").is_file():
            splits = sorted(path.parent.name for path in folder.glob("*/state.json"))
            raise DataError(f"{shown(folder)}: has no split {shown(spec.split)}; it has {listed(splits)}")
        return SavedFolder(folder / spec.split)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return SavedFolder(folder)
    names = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [name for name in names if not any(part.startswith(".") for part in name.parts)]
    data = [name for name in names if kind_of(name) is not None and not _BESIDE.fullmatch(name.name.lower())]
    if not data:
        seen = f"it holds {listed([str(name) for name in names], 5)}" if names else "it is empty"
        raise DataError(f"{shown(folder)}: holds no data: {seen}; expected {_EXPECTED} files")
    data = _of_split(spec, folder, data)
    kinds = sorted({kind_of(name) or "" for name in data})
    if len(kinds) > 1:
        raise DataError(f"{shown(folder)}: holds files of the kinds {listed(kinds)}; expected one kind, or name a file")
    beside = tuple(str(name) for name in names if name not in data)
    return LocalFiles(kinds[0], tuple(folder / name for name in data), beside)


def _of_split(spec: DatasetSpec, folder: Path, names: Sequence[Path]) -> list[Path]:
    """The files of the split that is asked for, where their names say which split they belong to."""
    splits = {name: _split_of(name) for name in names}
    known = sorted({split for split in splits.values() if split is not None})
    unnamed = [str(name) for name, split in splits.items() if split is None]
    if not known or (unnamed and all(kind_of(name) == "txt" for name in names)):  # documents may be called anything
        if spec.split != "train":
            raise DataError(f"{shown(folder)}: its files name no splits; expected no `split` in the recipe")
        return list(names)
    if unnamed:
        example = next(str(name) for name, split in splits.items() if split is not None)
        raise DataError(
            f"{shown(folder)}: {shown(example)} is named after a split and {listed(unnamed, 5)} is not; expected the "
            "files of one split in a folder of their own, or each file named in the recipe"
        )
    if spec.split not in known:
        raise DataError(f"{shown(folder)}: has no split {shown(spec.split)}; expected one of {listed(known)}")
    return [name for name, split in splits.items() if split == spec.split]


def _split_of(name: PurePath) -> str | None:
    words = re.split(r"[-._ 0-9/\\]+", str(name).lower())
    found = [_SPLITS[word] for word in words if word in _SPLITS]
    return found[0] if found else None
