"""Tiny bases with a tokenizer of whole words, and one finished run of each kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import TinyCheckpoints


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: TinyCheckpoints) -> Path:
    """A tiny causal language model."""
    from tests.model.builders import with_tokenizer

    return with_tokenizer(tiny_checkpoint("llama"), tmp_path_factory.mktemp("finetune") / "llama", pad=True)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: TinyCheckpoints) -> Path:
    """A tiny encoder with a head for three classes, whose labels have no names yet; it does without dropout."""
    from tests.model.builders import with_tokenizer

    folder = with_tokenizer(tiny_checkpoint("bert"), tmp_path_factory.mktemp("finetune") / "bert", pad=True)
    config = json.loads((folder / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
