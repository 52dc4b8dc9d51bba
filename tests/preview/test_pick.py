"""From a preview to the merge recipe of one of its points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mergekit_bayes.merge.schemas import method_schemas
from mergekit_bayes.preview.run import preview
from mergekit_bayes.recipe import MergeRecipe, load_recipe
from tests.cli.conftest import Command, command  # noqa: F401 - a fixture
from tests.preview.conftest import Recipes


@pytest.fixture
def folder(recipe: Recipes, tmp_path: Path) -> Path:
    content = recipe(
        tasks=[{"name": "t1"}, {"name": "t3"}], fidelity="surrogate", methods=["task_arithmetic", "posterior"]
    )
    return preview(content, tmp_path / "out").folder


def picked(text: str) -> tuple[str, list[Any]]:
    from mergekit_bayes.recipe import parse_document

    merge = load_recipe(parse_document(text, "picked.yaml").data, expect=MergeRecipe, methods=method_schemas())
    return merge.merge_method, [dict(source.parameters.entries)["weight"] for source in merge.models]


def gains(folder: Path) -> dict[tuple[str, tuple[float, ...]], list[float]]:
    front = json.loads((folder / "front.json").read_text())
    return {
        (point["method"], tuple(point["weights"])): list(point["surrogate"]["normalised"].values())
        for point in front["points"]
    }


def test_max_min_and_at_least_are_what_they_say(folder: Path, command: Command) -> None:  # noqa: F811
    known = gains(folder)
    done = command("pick", folder, "--max-min")
    assert done.code == 0
    method, weights = picked(done.out)
    assert min(known[method, tuple(weights)]) == pytest.approx(max(min(each) for each in known.values()))
    done = command("pick", folder, "--at-least", "t1=0.5,t3=0.1")
    method, weights = picked(done.out)
    allowed = {place: each for place, each in known.items() if each[0] >= 0.5 and each[1] >= 0.1}
    assert sum(known[method, tuple(weights)]) == pytest.approx(max(sum(each) for each in allowed.values()))


def test_a_file_is_written_and_the_method_can_be_chosen(folder: Path, command: Command, tmp_path: Path) -> None:  # noqa: F811
    target = tmp_path / "recipe.yaml"
    done = command("pick", folder, target, "--knee", "--method", "posterior")
    assert (done.code, done.out) == (0, "")
    assert picked(target.read_text())[0] == "posterior"
    done = command("pick", folder, "--weights", "0.3,0.9", "--method", "task_arithmetic")
    assert picked(done.out) == ("task_arithmetic", [0.3, 0.9])
    assert "# not looked at" in done.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--at-least", "t1=0.99,t3=0.99"], "none of 10 mixes keeps so much; the nearest has t1="),
        (["--at-least", "t2=0.5"], "--at-least t2: no such task; there are t1, t3"),
        (["--max-min", "--tier", "evaluated"], "--tier evaluated: this preview has surrogate"),
        (["--max-min", "--method", "ties"], "--method ties: this preview has task_arithmetic, posterior"),
        (["--weights", "1,2,3", "--method", "posterior"], "--weights: 3 for 2 models"),
        (["--weights", "1,2"], "--weights: say which --method"),
        ([], "expected one of --max-min, --knee, --at-least and --weights"),
        (["--at-least", "t1"], "expected TASK=SHARE"),
    ],
)
def test_what_cannot_be_picked_is_one_message(
    folder: Path,
    command: Command,  # noqa: F811
    arguments: list[str],
    message: str,
) -> None:
    done = command("pick", folder, *arguments)
    assert done.code == 2
    assert message in " ".join(done.err.split())
    assert "Traceback" not in done.err


def test_a_folder_that_is_no_preview(command: Command, tmp_path: Path) -> None:  # noqa: F811
    done = command("pick", tmp_path, "--max-min")
    assert (done.code, done.out) == (2, "")
    assert "expected the folder of a preview" in done.err
