"""One question asked of five groups of sections of Debian's packages: is it a program, by its one-line description?"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping, Sequence

from evaluation.merging.packages import Row

DOMAINS: Mapping[str, tuple[str, ...]] = {
    "media": ("fonts", "games", "graphics", "sound", "video"),
    "desktop": ("gnome", "gnustep", "kde", "utils", "x11", "xfce"),
    "network": ("admin", "comm", "database", "httpd", "mail", "net", "web"),
    "science": ("electronics", "gnu-r", "hamradio", "math", "science"),
    "writing": ("doc", "editors", "localization", "tex", "text"),
}
"""Disjoint groups of sections; the base learns the first, an expert each of the others."""

LABELS = ("other", "program")
SIZES: Mapping[str, int] = {"test": 60, "tuning": 20, "train": 240}
"""Rows of each label in each domain, at most."""

_ROLE = re.compile(r"\brole::([\w-]+)")


def read_domains() -> dict[str, dict[str, list[Row]]]:
    """Rows by domain and part, from the package index of this machine; no source package is in two parts.

    Raises:
        SystemExit: the index is empty, or has no tags.
    """
    printed = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    found = split_domains(parse(printed))
    short = [domain for domain, parts in found.items() if len(parts["train"]) < SIZES["test"]]
    if short:
        raise SystemExit(f"apt-cache dumpavail has too few tagged packages for {', '.join(short)}: run apt-get update")
    return found


def parse(printed: str) -> list[tuple[str, Row]]:
    """Section and row of every package with exactly one role among its tags, one per description, in a fixed order.

    A row's `section` is its label: `program` where the role is `role::program`, else `other`.
    """
    unique: dict[str, tuple[str, Row]] = {}
    for paragraph in re.sub(r"\n ", " ", printed).split("\n\n"):
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line)
        roles, text = set(_ROLE.findall(fields.get("Tag", ""))), fields.get("Description", "").strip()
        if len(roles) != 1 or not text:
            continue
        source = fields.get("Source", fields.get("Package", "")).split(" ")[0]
        row = Row(source, LABELS["program" in roles], text)
        kept = unique.setdefault(text.casefold(), (fields.get("Section", "").split("/")[-1], row))
        if row.order < kept[1].order:
            unique[text.casefold()] = fields.get("Section", "").split("/")[-1], row
    return sorted(unique.values(), key=lambda pair: pair[1].order)


def split_domains(rows: Sequence[tuple[str, Row]]) -> dict[str, dict[str, list[Row]]]:
    """Parts with as many programs as others, in every domain; a source package is in one part of one domain."""
    found: dict[str, dict[str, list[Row]]] = {}
    taken: set[str] = set()
    for domain, sections in DOMAINS.items():
        own = [row for section, row in rows if section in sections and row.source not in taken]
        found[domain] = {}
        for part, size in SIZES.items():
            by_label = [[row for row in own if row.section == label] for label in LABELS]
            count = min(size, *map(len, by_label))
            chosen = [row for each in by_label for row in each[:count]]
            sources = {row.source for row in chosen}
            own = [row for row in own if row.source not in sources]
            taken |= sources
            found[domain][part] = sorted(chosen, key=lambda row: row.order)
    return found
