"""Tiny bases with a tokenizer of whole words, and one finished run of each kind."""

from __future__ import annotations

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
    """A tiny encoder with a head for three classes, whose labels have no names yet."""
    from tests.model.builders import with_tokenizer

    return with_tokenizer(tiny_checkpoint("bert"), tmp_path_factory.mktemp("finetune") / "bert", pad=True)
