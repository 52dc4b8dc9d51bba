"""Every recipe in `recipes/finetune`: it names its own command and trains, on a tiny model and a handful of rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from mergekit_bayes.finetune.run import finetune
from mergekit_bayes.merge.load import load_recipe
from mergekit_bayes.recipe.finetune import FinetuneRecipe
from tests.data.tokenizers import byte_level
from tests.model.builders import minilm

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "finetune").rglob("*.yaml"))
NAMES = [f"{path.parent.name}/{path.stem}" for path in RECIPES]


def _rows(kind: str, which: str) -> list[dict[str, object]]:
    """Rows of the kind that the recipes of a folder train on; `which` makes those of one file differ from another's."""
    if kind == "hub":
        turns = [("user", f"How sure is {which}?"), ("assistant", "As sure as the data.")]
        return [{"messages": [{"role": role, "content": text} for role, text in turns]}] * 4
    if kind == "stdlib_lm":
        return [{"text": f"def {which}(mean, precision):\n    return mean * precision\n" * 20}] * 4
    return [{"text": f"{which}: a {label} for everybody", "label": label} for label in ("game", "mailer")] * 4


def _write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What takes the place of the model that the recipes of a folder name."""
    from transformers import LlamaConfig, LlamaForCausalLM

    chat = tmp_path_factory.mktemp("models") / "chat"
    tokenizer = byte_level()
    # wide enough to be quantised in blocks of 64
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(chat)
    tokenizer.save_pretrained(chat)
    base = ROOT / "examples" / "stdlib_lm" / "artefacts" / "base"
    return {"hub": chat, "stdlib_lm": base, "package_sections": minilm()}


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_header_states_the_command(path: Path) -> None:
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    command = re.search(r"bayes-merge (\S+) OUT", header)
    assert command is not None
    assert (ROOT / command.group(1)) == path


def test_recipes_for_comparison_differ_in_the_optimizer_alone() -> None:
    folder = ROOT / "recipes" / "finetune" / "package_sections"
    ours, theirs = (load_recipe(folder / f"{name}.yaml").resolved() for name in ("ivon", "adamw"))
    differing = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
    assert differing == {"optimizer", "output"}  # AdamW has no precision to write


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_trains(path: Path, models: dict[str, Path], tmp_path: Path) -> None:
    kind = path.parent.name
    recipe = load_recipe(path, expect=FinetuneRecipe)
    small = {
        "model.path": models[kind],
        "data.train.path": _write(tmp_path / "train.jsonl", _rows(kind, "one")),
        "data.max_length": 64,
        "training.max_steps": 2,
        "training.warmup_steps": 0,
        "training.per_device_train_batch_size": 1,
    }
    if recipe.data.eval:
        small["data.eval"] = _write(tmp_path / "eval.jsonl", _rows(kind, "another"))
    changes = [f"{key}={value}" for key, value in small.items()]
    tiny = load_recipe(path, expect=FinetuneRecipe, overrides=changes)
    result = finetune(tiny, tmp_path / "out")
    assert result.report["length"]["steps"] == 2
    assert (result.folder / "adapter_model.safetensors").exists()
    assert (result.folder / "precision.safetensors").exists() == (recipe.optimizer.name == "ivon")
