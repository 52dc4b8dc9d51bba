"""Short texts with labels from the package index of Debian: what section does a one-line description belong to?

    python examples/package_sections/sections.py

writes `data/{train,validation,test}.jsonl` beside this file, rows `{"text": ..., "label": ...}`, from what
`apt-cache dumpavail` prints on this machine; run `apt-get update` first if it prints nothing. The descriptions belong
to the packages' authors and are read where they are: none is part of this repository.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

SECTIONS = ("admin", "editors", "games", "graphics", "mail", "math", "net", "science", "sound", "web")
DATA = Path(__file__).resolve().parent / "data"


@dataclass(frozen=True)
class Package:
    """One package of the index.

    Attributes:
        source: the source package, which whole families of packages share.
        section: its label.
        text: its description, one line.
    """

    source: str
    section: str
    text: str


def read_index() -> list[Package]:
    """Every package of the chosen sections, sorted; empty where there is no index."""
    try:
        printed = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return []
    return sorted(parse_index(printed), key=lambda package: (package.section, package.source, package.text))


def parse_index(text: str) -> list[Package]:
    """Packages of the chosen sections in the text of an index; paragraphs of `Key: value` lines."""
    found = []
    for paragraph in text.split("\n\n"):
        fields = _fields(paragraph)
        section, description = fields.get("Section", "").split("/")[-1], fields.get("Description", "")
        if section in SECTIONS and description:
            source = fields.get("Source", fields.get("Package", "")).split(" ")[0]
            found.append(Package(source, section, description))
    return found


def _fields(paragraph: str) -> dict[str, str]:
    pairs = (line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and not line.startswith(" "))
    return {pair[0]: pair[1].strip() for pair in pairs}


def split(packages: Iterable[Package], sizes: Mapping[str, int]) -> dict[str, list[Package]]:
    """Equally many packages of every section for each part; no source package is in two of them.

    Args:
        packages: of the index.
        sizes: packages per section by the name of the part, those that must be full first.

    Returns:
        Packages by part; fewer where a section is small. A text occurs once.
    """
    unique = {package.text.casefold(): package for package in sorted(packages, key=_order)}
    left = sorted(unique.values(), key=_order)
    parts: dict[str, list[Package]] = {}
    for name, size in sizes.items():
        taken = [p for section in SECTIONS for p in [q for q in left if q.section == section][:size]]
        sources = {package.source for package in taken}
        left = [package for package in left if package.source not in sources]
        parts[name] = sorted(taken, key=_order)
    return parts


def _order(package: Package) -> bytes:
    return blake2b(f"{package.source}/{package.text}".encode()).digest()


def write(parts: Mapping[str, list[Package]], folder: Path = DATA) -> None:
    """Write one file of JSON lines per part."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, packages in parts.items():
        lines = [json.dumps({"text": package.text, "label": package.section}) + "\n" for package in packages]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    """Read the index and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--test", type=int, default=150, help="packages per section")
    parser.add_argument("--validation", type=int, default=50)
    parser.add_argument("--train", type=int, default=100)
    parser.add_argument("--out", type=Path, default=DATA)
    arguments = parser.parse_args()
    sizes = {"test": arguments.test, "validation": arguments.validation, "train": arguments.train}
    parts = split(read_index(), sizes)
    if not parts["train"]:
        raise SystemExit("apt-cache dumpavail printed no packages; expected Debian's index: run apt-get update first")
    write(parts, arguments.out)
    print({name: len(packages) for name, packages in parts.items()})


if __name__ == "__main__":
    main()
