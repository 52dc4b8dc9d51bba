"""Bases with a tokenizer, made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import TinyCheckpoints
from tests.model.builders import with_tokenizer

Bases = Callable[..., Path]


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: TinyCheckpoints) -> Bases:
    """`base("llama", dtype="bfloat16")` -> folder of a tiny model with a tokenizer; copy before changing it."""
    root = tmp_path_factory.mktemp("bases")
    built: dict[str, Path] = {}

    def folder(name: str, *, pad: bool = False, **options: str) -> Path:
        key = repr((name, pad, sorted(options.items())))
        if key not in built:
            checkpoint = tiny_checkpoint(name, **options)
            built[key] = with_tokenizer(checkpoint, root / f"{name}-{len(built)}", pad=pad)
        return built[key]

    return folder
