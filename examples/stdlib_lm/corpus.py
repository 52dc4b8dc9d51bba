"""The text of the example: three domains of the Python distribution, split by whole document.

    python examples/stdlib_lm/corpus.py

writes the training documents to `text/{code,docs,headers}.jsonl` beside this file, where the recipes in
`recipes/finetune/stdlib_lm` read them.

Every Python installation already carries three kinds of text that differ enough to need different skills:
library source code, the prose of the language reference, and C headers. Nothing is downloaded.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

DOMAINS = ("code", "docs", "headers")
SEPARATOR = "<|endoftext|>"
TEXT = Path(__file__).resolve().parent / "text"

_HELD_OUT_CHARACTERS = {"code": 140_000, "docs": 90_000, "headers": 110_000}
_LARGEST_HELD_OUT_DOCUMENT = 30_000
_SHORTEST_SHARED_PARAGRAPH = 60
_LEFT_OUT = frozenset({"site-packages", "pydoc_data", "encodings"})
_OTHER_CODE = frozenset({"test", "tests", "idle_test", "idlelib", "lib2to3"})


@dataclass(frozen=True)
class Split:
    """Documents of one domain by name: `train` and `held_out` share no document and no long paragraph."""

    train: Mapping[str, str]
    held_out: Mapping[str, str]


def read_domain(domain: str) -> dict[str, str]:
    """Documents of one domain, name to text, in the order of their names.

    `code` is the standard library without its tests, `docs` the topics of `pydoc_data`, `headers` the C
    headers.
    """
    if domain == "docs":
        from pydoc_data.topics import topics

        return dict(sorted(topics.items()))
    if domain == "headers":
        return _read_files(Path(sysconfig.get_path("include")), "*.h")
    return {name: text for name, text in _read_library().items() if not _OTHER_CODE.intersection(Path(name).parts)}


def read_other_code() -> dict[str, str]:
    """Python source outside the `code` domain: tests and two bundled applications. Only the base sees it."""
    return {name: text for name, text in _read_library().items() if _OTHER_CODE.intersection(Path(name).parts)}


def split_domain(domain: str) -> Split:
    """Hold out the first documents, in the order of a hash of their names, up to the domain's size."""
    documents = read_domain(domain)
    held_out: dict[str, str] = {}
    for name in sorted(documents, key=lambda name: blake2b(f"{domain}/{name}".encode()).digest()):
        if len(documents[name]) > _LARGEST_HELD_OUT_DOCUMENT:
            continue
        held_out[name] = documents[name]
        if sum(map(len, held_out.values())) >= _HELD_OUT_CHARACTERS[domain]:
            break
    train = {name: text for name, text in documents.items() if name not in held_out}
    return Split(without_paragraphs_of(held_out.values(), train), held_out)


def without_paragraphs_of(held_out: Iterable[str], documents: Mapping[str, str]) -> dict[str, str]:
    """`documents` without any long paragraph that also occurs in `held_out`.

    The language reference repeats itself: a section is a topic of its own and part of a longer one.
    """
    seen = {_key(part) for text in held_out for part in _paragraphs(text)}
    kept = {
        name: "\n\n".join(part for part in _paragraphs(text) if not _is_long(part) or _key(part) not in seen)
        for name, text in documents.items()
    }
    return {name: text for name, text in kept.items() if text.strip()}


def write_training_text(folder: Path = TEXT) -> None:
    """Write one JSON line `{"text": ...}` per training document and one file per domain."""
    folder.mkdir(exist_ok=True)
    for domain in DOMAINS:
        lines = [json.dumps({"text": text.rstrip()}) + "\n" for text in split_domain(domain).train.values()]
        (folder / f"{domain}.jsonl").write_text("".join(lines), encoding="utf-8")


def join(documents: Mapping[str, str]) -> str:
    """One text, each document followed by the separator."""
    return "".join(f"{text.rstrip()}\n{SEPARATOR}\n" for text in documents.values())


def _read_library() -> dict[str, str]:
    files = _read_files(Path(sysconfig.get_path("stdlib")), "*.py")
    return {name: text for name, text in files.items() if not _LEFT_OUT.intersection(Path(name).parts)}


def _read_files(root: Path, pattern: str) -> dict[str, str]:
    texts = {}
    for path in sorted(root.rglob(pattern)):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a handful of test files are written in other encodings on purpose
        if text.strip() and SEPARATOR not in text:
            texts[path.relative_to(root).as_posix()] = text
    return texts


def _paragraphs(text: str) -> list[str]:
    return text.split("\n\n")


def _key(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _is_long(paragraph: str) -> bool:
    return len(_key(paragraph)) >= _SHORTEST_SHARED_PARAGRAPH


if __name__ == "__main__":
    write_training_text()
