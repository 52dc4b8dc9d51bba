"""Every recipe in `recipes/precision`: it names its own command and runs, on a tiny model and a handful of rows."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from mergekit_bayes.checkpoint.sidecar import open_sidecar
from mergekit_bayes.estimate.run import estimate_precision
from mergekit_bayes.finetune.run import finetune
from mergekit_bayes.recipe import FinetuneRecipe, PrecisionRecipe, load_recipe
from tests.data.tokenizers import byte_level
from tests.model.builders import minilm
from tests.tiny_models import save_tiny_adapter

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "precision").rglob("*.yaml"))
NAMES = [f"{path.parent.name}/{path.stem}" for path in RECIPES]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_header_states_the_command(path: Path) -> None:
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    commands = re.findall(r"bayes-merge (\S+) OUT", header)
    assert [ROOT / command for command in commands] == [path]
    launched = re.findall(r"accelerate launch .*-m mergekit_bayes (\S+) OUT", header)
    assert all(ROOT / command == path for command in launched)
    assert all((ROOT / name).exists() for name in re.findall(r"(?:examples|recipes)/\S+\.(?:py|yaml)", header))


def _chat(folder: Path) -> Path:
    """A tiny chat model, wide enough to be quantised in blocks of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_level()
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _state(folder: Path) -> Path:
    """What AdamW leaves behind of the tiny chat model after one step."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters())
    model(input_ids=torch.arange(4)[None], labels=torch.arange(4)[None]).loss.backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    return folder


def _classifier(folder: Path, rows: Path) -> Path:
    """The adapter and head that the recipe for fine-tuning leaves."""
    path = ROOT / "recipes" / "finetune" / "package_sections" / "adamw.yaml"
    small = {"model.path": minilm(), "data.train.path": rows, "data.eval": "null", "training.max_steps": 1}
    small |= {"training.per_device_train_batch_size": 1, "training.warmup_steps": 0}
    changes = [f"{key}={value}" for key, value in small.items()]
    return finetune(load_recipe(path, expect=FinetuneRecipe, overrides=changes), folder).folder


def _rows(path: Path) -> list[dict[str, object]]:
    if path.parent.name == "hub":
        turns = [("user", "How sure are you?"), ("assistant", "As sure as the data.")]
        return [{"messages": [{"role": role, "content": text} for role, text in turns]}] * 4
    if path.parent.name == "stdlib_lm":
        return [{"text": "def merge(mean, precision):\n    return mean * precision\n" * 20}] * 4
    return [{"text": f"a {label} for everybody", "label": label} for label in ("game", "mailer")] * 2


def _changes(path: Path, folder: Path) -> dict[str, object]:
    """What makes a recipe small enough for a test."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in _rows(path)), encoding="utf-8")
    common: dict[str, object] = {"data.train.path": rows, "data.max_length": 64, "num_examples": 3}
    if path.stem == "adam":
        model = _state(_chat(folder / "model"))
        return {"model": model, "optimizer_state": model}
    if path.parent.name == "hub":
        model = _chat(folder / "model")
        return {"model.path": model, "adapter": save_tiny_adapter(model, folder / "adapter", seed=1), **common}
    if path.parent.name == "package_sections":
        return {"model.path": minilm(), "adapter": _classifier(folder / "adapter", rows), **common}
    return common


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_estimates(path: Path, tmp_path: Path) -> None:
    changes = [f"{key}={value}" for key, value in _changes(path, tmp_path).items()]
    recipe = load_recipe(path, expect=PrecisionRecipe, overrides=changes)
    result = estimate_precision(recipe, tmp_path / "out")
    metadata = open_sidecar(result.folder).metadata
    assert (metadata.estimator, metadata.space) == (recipe.estimator.name, recipe.space)
    assert metadata.num_examples == (recipe.training_units or result.report["units"]["seen"])
