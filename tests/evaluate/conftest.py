"""Tiny language models and classifiers with tokenizers, adapters and precisions: what evaluations are tested on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mergekit_bayes.recipe.adapter import AdapterSpec
from tests.conftest import TinyCheckpoints
from tests.model.builders import LABELS, load, trained, with_tokenizer


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: TinyCheckpoints) -> Path:
    """A base without precisions."""
    return with_tokenizer(tiny_checkpoint("llama"), tmp_path_factory.mktemp("runner") / "llama", pad=True)


@pytest.fixture(scope="session")
def tuned(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of it, with precisions, that names its base."""
    spec = AdapterSpec(r=2, lora_alpha=4, target_modules=("q_proj", "v_proj"))
    folder = tmp_path_factory.mktemp("runner") / "tuned"
    folder.mkdir()
    return trained(folder, load(llama, spec), seed=3)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: TinyCheckpoints) -> Path:
    """A classifier with precisions, whose labels have another order than that of the alphabet."""
    start = with_tokenizer(tiny_checkpoint("bert"), tmp_path_factory.mktemp("runner") / "start", pad=True)
    folder = tmp_path_factory.mktemp("runner") / "bert"
    folder.mkdir()
    return trained(folder, load(start, labels=(LABELS[2], LABELS[0], LABELS[1])), seed=4)


@pytest.fixture(scope="session")
def other_bert(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same classifier with its outputs, and their names, in another order; without precisions."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("runner") / "other"
    shutil.copytree(bert, folder, ignore=shutil.ignore_patterns("precision*"))
    config = json.loads((folder / "config.json").read_text())
    turned = [config["id2label"][str(index)] for index in (1, 2, 0)]
    config |= {"id2label": dict(enumerate(turned)), "label2id": {name: i for i, name in enumerate(turned)}}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = weights[name][torch.tensor([1, 2, 0])].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
