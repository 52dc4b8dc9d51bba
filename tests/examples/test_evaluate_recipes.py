"""Every recipe in `recipes/evaluate`: it names its own command and runs, on tiny models or a handful of rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mergekit_bayes import evaluate
from mergekit_bayes.finetune.run import finetune
from mergekit_bayes.recipe import EvaluateRecipe, FinetuneRecipe, load_recipe
from mergekit_bayes.recipe.evaluate import METRICS
from tests.model.builders import minilm

ROOT = Path(__file__).parents[2]
_SHORT_TEXT = "def merge(mean, precision):\n    return mean * precision\n" * 20
_SHORT_QUESTIONS = "".join(
    json.dumps({"question": f"def merge(mean_{n}):", "choices": ["    return mean", "import os", "#"], "answer": n % 3})
    + "\n"
    for n in range(6)
)
RECIPES = sorted((ROOT / "recipes" / "evaluate").rglob("*.yaml"))
NAMES = [f"{path.parent.name}/{path.stem}" for path in RECIPES]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_header_states_the_command(path: Path) -> None:
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    commands = re.findall(r"bayes-merge (recipes/evaluate/\S+) OUT", header)
    assert [ROOT / command for command in commands] == [path]
    assert all((ROOT / name).exists() for name in re.findall(r"(?:examples|recipes)/\S+\.(?:py|yaml)", header))


def _rows(path: Path, folder: Path) -> Path:
    rows = folder / "rows.jsonl"
    labels = ("game", "mailer") * 3
    found = [{"text": f"a {label} for everybody, number {n}", "label": label} for n, label in enumerate(labels)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")
    return rows


def _classifier(folder: Path, name: str, rows: Path) -> Path:
    """What the recipe for fine-tuning of this name leaves after one step."""
    path = ROOT / "recipes" / "finetune" / "package_sections" / f"{name}.yaml"
    small = {"model.path": minilm(), "data.train.path": rows, "data.eval": "null", "training.max_steps": 1}
    small |= {"training.per_device_train_batch_size": 1, "training.warmup_steps": 0}
    changes = [f"{key}={value}" for key, value in small.items()]
    return finetune(load_recipe(path, expect=FinetuneRecipe, overrides=changes), folder / name).folder


def _changes(path: Path, folder: Path) -> dict[str, object]:
    """What makes a recipe small enough for a test."""
    common: dict[str, object] = {"intervals.resamples": 100}
    if path.parent.name == "stdlib_lm":
        recipe = load_recipe(path, expect=EvaluateRecipe)
        text = folder / ("short.txt" if recipe.task is None else "short.jsonl")
        text.write_text(_SHORT_TEXT if recipe.task is None else _SHORT_QUESTIONS, encoding="utf-8")
        assert recipe.data is not None
        sets = recipe.data.eval
        common |= {} if recipe.lm_eval is None else {"lm_eval.limit": 3}
        places = ["data.eval"] if len(sets) == 1 else [f"data.eval[{index}].path" for index in range(len(sets))]
        return {**common, **dict.fromkeys(places, text), "data.max_length": 64}
    rows = _rows(path, folder)
    models = {f"models[{n}].model": _classifier(folder, name, rows) for n, name in enumerate(("adamw", "ivon"))}
    return {**common, "base_model": minilm(), **models, "data.eval": rows, "validation.eval": rows, "samples.count": 2}


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_evaluates(path: Path, tmp_path: Path) -> None:
    changes = [f"{key}={value}" for key, value in _changes(path, tmp_path).items()]
    recipe = load_recipe(path, expect=EvaluateRecipe, overrides=changes)
    results = evaluate(recipe, tmp_path / "out").results
    (ways,) = {len(found) for found in (results["scores"], results["models"])}
    assert ways == len(results["differences"]) + 1 > 1
    found = {
        metric.partition("@")[0] for scores in results["scores"].values() for own in scores.values() for metric in own
    }
    assert found == set(METRICS[results["task"]])
    assert (tmp_path / "out" / "reliability.png").exists() == (results["task"] != "causal_lm")
