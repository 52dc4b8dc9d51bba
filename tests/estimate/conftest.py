"""Tiny bases with a tokenizer, and adapters and classifiers on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import TinyCheckpoints


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: TinyCheckpoints) -> Path:
    """A tiny causal language model."""
    from tests.model.builders import with_tokenizer

    return with_tokenizer(tiny_checkpoint("llama"), tmp_path_factory.mktemp("estimate") / "llama", pad=True)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: TinyCheckpoints) -> Path:
    """One that stores the weights of its layers transposed, and ties its head."""
    from tests.model.builders import with_tokenizer

    return with_tokenizer(tiny_checkpoint("gpt2"), tmp_path_factory.mktemp("estimate") / "gpt2", pad=True)


@pytest.fixture(scope="session")
def adapter(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter of the llama."""
    from tests.tiny_models import save_tiny_adapter

    return save_tiny_adapter(llama, tmp_path_factory.mktemp("estimate") / "adapter", seed=1)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: TinyCheckpoints) -> Path:
    """A classifier that knows its labels, in another order than that of the alphabet."""
    from tests.model.builders import with_tokenizer

    folder = with_tokenizer(tiny_checkpoint("bert"), tmp_path_factory.mktemp("estimate") / "bert", pad=True)
    config = json.loads((folder / "config.json").read_text())
    names = ("stone", "animal", "plant")
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
