"""Tokenizers that many tests share; nobody changes them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.data import tokenizers


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Byte-level, with a chat template and without anything in front of a text."""
    return tokenizers.byte_level()


@pytest.fixture(scope="session")
def classifier_tokenizer() -> Any:
    """Word pieces with token types; at most 16 tokens."""
    return tokenizers.word_pieces()
