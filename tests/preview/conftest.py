"""A tiny base with a tokenizer, two and three adapters of it, and tasks that are tables in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TinyCheckpoints

WORDS = 40


def texts(count: int, step: int) -> list[dict[str, Any]]:
    """Sentences in which every word follows from the one before."""
    return [
        {"text": " ".join(f"w{(row + step * place) % WORDS}" for place in range(4 + row % 4))} for row in range(count)
    ]


TABLES: dict[str, list[dict[str, Any]]] = {f"task {step}": texts(7, step) for step in (1, 3, 5)}

Recipes = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: TinyCheckpoints) -> Path:
    """The base."""
    from tests.model.builders import with_tokenizer

    return with_tokenizer(tiny_checkpoint("llama"), tmp_path_factory.mktemp("preview") / "llama", pad=True)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> list[Path]:
    """Three adapters of the base, of different ranks, on different layers."""
    from tests.tiny_models import save_tiny_adapter

    root = tmp_path_factory.mktemp("preview_adapters")
    shapes: list[dict[str, Any]] = [
        {"r": 4},
        {"r": 2, "target_modules": ["q_proj", "down_proj"]},
        {"r": 3, "target_modules": "all-linear"},
    ]
    return [save_tiny_adapter(llama, root / f"a{seed}", seed=seed, **shape) for seed, shape in enumerate(shapes)]


@pytest.fixture
def recipe(llama: Path, adapters: list[Path]) -> Recipes:
    """`recipe(sources=2, methods=["task_arithmetic"])` -> a small preview, as a dictionary."""

    def make(*, sources: int = 2, **changes: Any) -> dict[str, Any]:
        content: dict[str, Any] = {
            "kind": "preview",
            "base_model": str(llama),
            "models": [{"model": str(each), "precision": 2.0 + place} for place, each in enumerate(adapters[:sources])],
            "methods": ["task_arithmetic"],
            "tasks": [{"name": f"t{step}", "data": f"task {step}"} for step in (1, 3, 5)[:sources]],
            "design": {"partitions": 4},
            "precision": {"prior": 0.5},
            "evaluation": {"batch_size": 4, "mixes_per_batch": 3},
        }
        return {key: value for key, value in {**content, **changes}.items() if value is not None}

    return make
