"""The labelled texts from a package index: families of packages stay on one side, texts occur once."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "package_sections" / "sections.py"

INDEX = """Package: chess-data
Source: chess (1.2)
Section: games
Description: board, pieces and clocks
Tag: game::board,
 role::app-data

Package: chess
Section: contrib/games
Description: game of kings

Package: libmail
Section: libs
Description: another section

Package: postman
Section: mail
Description: delivers
"""


@pytest.fixture(scope="module")
def sections() -> ModuleType:
    spec = importlib.util.spec_from_file_location("package_sections", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their own module
    spec.loader.exec_module(module)
    return module


def test_reads_sections_sources_and_first_lines(sections: ModuleType) -> None:
    found = [(p.source, p.section, p.text) for p in sections.parse_index(INDEX)]
    assert found == [
        ("chess", "games", "board, pieces and clocks"),
        ("chess", "games", "game of kings"),
        ("postman", "mail", "delivers"),
    ]


def test_splits_by_source_package_and_takes_equally_many_of_each_section(sections: ModuleType, tmp_path: Path) -> None:
    packages = [
        sections.Package(f"{section}{index // 3}", section, f"{section} number {index % 40}")
        for section in sections.SECTIONS
        for index in range(60)
    ]
    sizes = {"test": 10, "train": 12}
    parts = sections.split(packages, sizes)
    assert not {p.source for p in parts["train"]} & {p.source for p in parts["test"]}
    assert not {p.text for p in parts["train"]} & {p.text for p in parts["test"]}
    assert set(Counter(p.section for p in parts["test"]).values()) == {10}
    assert sections.split(list(reversed(packages)), sizes) == parts
    sections.write(parts, tmp_path)
    first = json.loads((tmp_path / "train.jsonl").read_text().splitlines()[0])
    assert first == {"text": parts["train"][0].text, "label": parts["train"][0].section}


def test_says_what_to_do_where_there_is_no_index(
    sections: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sections, "read_index", list)
    monkeypatch.setattr("sys.argv", ["sections.py", "--out", str(tmp_path / "data")])
    with pytest.raises(SystemExit, match="apt-get update"):
        sections.main()
    assert not (tmp_path / "data").exists()
