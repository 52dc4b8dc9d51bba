"""Every faulty recipe of `golden/recipe_errors` and the exact text that it is refused with."""

from __future__ import annotations

import pytest

from mergekit_bayes.errors import RecipeError
from mergekit_bayes.recipe import load_recipe
from tests.golden.compare import GOLDEN, check_golden
from tests.recipe.schemas import METHODS

FOLDER = GOLDEN / "recipe_errors"
CASES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


@pytest.fixture
def in_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(FOLDER)  # messages name the file as the user wrote it


@pytest.mark.usefixtures("in_folder")
@pytest.mark.parametrize("case", CASES)
def test_the_text_of_a_refusal(case: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(f"{case}.yaml", methods=METHODS)
    check_golden(FOLDER / f"{case}.txt", f"{caught.value}\n")


@pytest.mark.parametrize("case", CASES)
def test_every_line_of_a_refusal_has_a_place_in_the_file(case: str) -> None:
    lines = (FOLDER / f"{case}.txt").read_text().splitlines()
    length = (FOLDER / f"{case}.yaml").read_text().count("\n") + 2
    places = []
    for line in lines:
        name, row, rest = line.split(":", 2)
        column = rest.split("  ", 1)[0]
        assert name == f"{case}.yaml"
        assert 1 <= int(row) <= length
        places.append((int(row), int(column)))
    assert places == sorted(places)
    assert lines


def test_no_text_without_a_recipe() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.txt")) == CASES


@pytest.mark.parametrize("jargon", ["Input should", "pydantic", "validation error", "dict", "str_type", "None"])
def test_refusals_are_in_plain_words(jargon: str) -> None:
    texts = {path.stem: path.read_text() for path in FOLDER.glob("*.txt")}
    assert [name for name, text in texts.items() if jargon in text] == []


def test_refusals_end_as_sentences() -> None:
    lines = [line for path in sorted(FOLDER.glob("*.txt")) for line in path.read_text().splitlines()]
    assert [line for line in lines if not line.endswith((".", "?"))] == []
