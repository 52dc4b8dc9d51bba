"""The surface of the command, frozen: every option and its words."""

from __future__ import annotations

import pytest
from mergekit_bayes.cli.main import VERBS

from mergekit_bayes import __version__
from tests.cli.conftest import Command
from tests.golden.compare import GOLDEN, check_golden

FOLDER = GOLDEN / "help"


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(command: Command, flag: str) -> None:
    done = command(flag)
    assert (done.code, done.err) == (0, "")
    check_golden(FOLDER / "bayes-merge.txt", done.out)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(command: Command, verb: str) -> None:
    done = command(verb, "--help")
    assert (done.code, done.err) == (0, "")
    check_golden(FOLDER / f"{verb}.txt", done.out)


def test_every_text_belongs_to_a_verb() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == {"bayes-merge", *VERBS}


def test_help_after_a_recipe_is_that_of_run(command: Command) -> None:
    assert command("recipe.yaml", "--help") == command("run", "--help")


def test_without_arguments_the_help_is_shown(command: Command) -> None:
    done = command()
    assert done.code == 2
    assert "RECIPE [OUT] | COMMAND" in done.out + done.err


def test_version(command: Command) -> None:
    done = command("--version")
    assert (done.code, done.out, done.err) == (0, f"bayes-merge {__version__}\n", "")
