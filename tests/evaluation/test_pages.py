"""Every page of evidence is in the table, its commands are those that the page shows, and one command runs them."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from evaluation import __main__ as command
from evaluation import pages
from evaluation.pages import PAGES, Page, Preparation

ROOT = Path(command.__file__).parent.parent
PYTHON = "python -m evaluation."
SPEED = [page for page in PAGES if page.name.startswith("speed/")]


def words(text: str) -> list[str]:
    """A command without its environment, comment and the interpreter's folder."""
    found = shlex.split(text, comments=True)
    start = next(place for place, word in enumerate(found) if word.endswith("python"))
    return ["python", *found[start + 1 :]]


def shown(page: Path) -> list[list[str]]:
    """The evaluation commands in the text blocks of a page."""
    blocks = re.findall(r"```text\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words(line) for line in lines if PYTHON in line]


def modules() -> list[str]:
    named = [words(each)[2] for page in PAGES for each in page.commands]
    return list(dict.fromkeys(named))


def options(module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> set[str]:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(module).main()
    assert stopped.value.code == 0
    return set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out.partition("options:")[2]))


def test_every_folder_with_a_page_is_in_the_table() -> None:
    folders = {path.parent.name for path in (ROOT / "evaluation").glob("*/README.md")}
    assert folders == {page.folder.partition("/")[0] for page in PAGES}
    assert len({page.name for page in PAGES}) == len(PAGES)


def test_every_result_of_a_folder_of_speed_is_in_the_table() -> None:
    results = (ROOT / "evaluation" / "speed").rglob("*.json")
    measured = {str(path.relative_to(ROOT / "evaluation").with_suffix("")) for path in results}
    assert measured - {"speed/results"} | {"speed/merge"} == {page.name for page in SPEED}


@pytest.mark.parametrize("module", modules())
def test_commands_answer_help_and_know_the_options_of_table_and_pages(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = options(module, monkeypatch, capsys)
    texts = [words(each) for page in PAGES for each in page.commands]
    texts += [each for path in (ROOT / "evaluation").glob("*/README.md") for each in shown(path)]
    used = {word for text in texts if text[2] == module for word in text if word.startswith("--")}
    assert used <= known
    if module in {words(page.commands[-1])[2] for page in PAGES}:
        assert "--out" in known


@pytest.mark.parametrize("folder", sorted({page.folder.partition("/")[0] for page in PAGES}))
def test_pages_show_commands_of_the_table(folder: str) -> None:
    texts = shown(ROOT / "evaluation" / folder / "README.md")
    table = [words(each) for page in PAGES if page.folder == folder for each in page.commands]
    assert texts
    assert {text[2] for text in texts} <= {text[2] for text in table}
    if folder != "speed":  # whose measurements have pages of their own
        assert [text for text in table if text not in texts] == []


@pytest.mark.parametrize("page", SPEED, ids=lambda page: page.name)
def test_measurements_of_speed_were_made_by_the_command_of_the_table(page: Page) -> None:
    path = ROOT / "evaluation" / ("speed/README.md" if page.name == "speed/merge" else f"{page.name}.md")
    texts = re.findall(rf"`([^`]*{re.escape(PYTHON)}speed\.[^`]*)`", path.read_text())

    def placed(text: str) -> list[str]:
        return ["PYTHON" if word.startswith(("MERGEKIT", "PYTHON")) else word for word in words(text)]

    assert placed(page.commands[-1]) in [placed(text) for text in texts]


def test_all_pages_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    command.main([])
    out = capsys.readouterr().out
    assert all(
        re.search(rf"^{page.name} +{page.minutes} +{re.escape(page.asks)}$", out, re.MULTILINE) for page in PAGES
    )


@pytest.mark.parametrize(("name", "near"), [("mergin", "'merging'"), ("speed/optimiser", "'speed/optimizer'")])
def test_unknown_names_are_refused_with_the_nearest(name: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main([name])
    assert stopped.value.code == 2
    assert f"named {name!r}; did you mean {near}?" in capsys.readouterr().err


def test_a_plan_shows_what_would_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["fronts", "--plan", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    models = tmp_path / "work" / "models"
    assert lines[1] == f"{sys.executable} -m evaluation.fronts.train {models}"
    assert lines[2] == f"{sys.executable} -m evaluation.fronts.study {models} --out {tmp_path / 'out'}"
    assert list(tmp_path.iterdir()) == []


def printing(name: str, *texts: str, before: Sequence[Preparation] = ()) -> Page:
    return Page(name, "?", 1, tuple(texts), before=tuple(before))


def test_commands_run_in_order_with_their_places_and_what_is_there_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    make = Preparation("python -c 'import sys, pathlib; pathlib.Path(sys.argv[1]).mkdir(parents=True)' RUNS", "RUNS")
    say = "NAMED=RUNS python -c 'import os, sys; print(os.environ[\"NAMED\"], *sys.argv[1:])' key=MODELS/x"
    monkeypatch.setattr(command, "PAGES", (printing("said/aloud", say, before=[make]),))
    for made in (1, 0):
        command.main(["said/aloud", "--work", str(tmp_path / "work"), "--out", str(tmp_path)])
        out, err = capfd.readouterr()
        runs, models = tmp_path / "work" / "said_aloud" / "runs", tmp_path / "work" / "models"
        assert out.split() == [str(runs), f"key={models}/x", "--out", str(tmp_path)]
        assert err.count("mkdir") == made
    assert pages.PAGES is PAGES


def test_the_first_command_that_fails_ends_the_run_with_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    texts = ("python -c 'raise SystemExit(3)'", "python -c 'print(1)'")
    monkeypatch.setattr(command, "PAGES", (printing("broken", *texts),))
    with pytest.raises(SystemExit) as stopped:
        command.main(["broken", "--work", str(tmp_path), "--out", str(tmp_path)])
    assert stopped.value.code == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert "stopped with exit code 3" in err
