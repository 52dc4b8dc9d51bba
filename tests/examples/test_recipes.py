"""Every recipe in `recipes/merge`: it names its own command, can be planned, and its merge is better than no merge."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mergekit_bayes import load_recipe, method_names, plan_merge

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "merge").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_every_method_has_a_recipe_of_its_name():
    assert set(method_names()) <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_header_states_the_command(path):
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    command = re.search(r"bayes-merge (\S+) OUT", header)
    assert command is not None
    assert (ROOT / command.group(1)) == path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_can_be_planned_from_the_repository_root(path, tmp_path):
    plan = plan_merge(load_recipe(path), tmp_path / "out")
    assert len(plan.steps) > 40
    assert not (tmp_path / "out").exists()
