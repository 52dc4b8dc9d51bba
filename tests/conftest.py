"""What every test shares: single-threaded libraries, reproducible hypothesis, tiny checkpoints built once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

# before torch or transformers is imported anywhere: threads that wait for each other slow a busy machine
# several times, and no test may reach for the network
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import hypothesis
import pytest

if TYPE_CHECKING:
    import torch

# no deadline: wall time of one example says nothing on a shared machine; derandomized: a red test stays red
hypothesis.settings.register_profile("repository", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("repository")

TinyCheckpoints = Callable[..., Path]


def pytest_configure(config: pytest.Config) -> None:
    """Tests run on the processor, also where there is a GPU; `-m gpu` runs those that are about one."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test first: begun last, it would leave all other processes without work. No coverage of slow tests.

    Tracing makes tests take two thirds longer, and what the slow ones run, the others have run in its parts. Not so
    what only several processes do (merge/processes.py): there the report shows less than is tested.
    """
    items.sort(key=lambda item: not item.nodeid.startswith("tests/test_readme.py"))
    for item in items:
        if item.get_closest_marker("slow") is not None:
            item.add_marker("no_cover")  # of pytest-cov


@pytest.fixture(autouse=True)
def _programs_are_covered_as_their_test_is(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a slow test starts is not traced either."""
    if request.node.get_closest_marker("no_cover") is not None:
        monkeypatch.delenv("COVERAGE_PROCESS_CONFIG", raising=False)


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoints:
    """`tiny_checkpoint("llama", seed=1, drift=0.01, dtype="bfloat16", max_shard_size="8KB")` -> folder.

    Arguments as in `tests.tiny_models.save_tiny_model`, dtype by name. Built once; copy before changing it.
    """
    root = tmp_path_factory.mktemp("tiny_models")
    built: dict[tuple[object, ...], Path] = {}

    def checkpoint(
        name: str,
        *,
        seed: int = 0,
        drift: float = 0.0,
        dtype: str = "float32",
        max_shard_size: str = "5GB",
    ) -> Path:
        import torch

        from tests.tiny_models import save_tiny_model

        key = (name, seed, drift, dtype, max_shard_size)
        if key not in built:
            torch_dtype: torch.dtype = getattr(torch, dtype)
            folder = root / f"{name}-{len(built)}"
            built[key] = save_tiny_model(
                name, folder, seed=seed, drift=drift, dtype=torch_dtype, max_shard_size=max_shard_size
            )
        return built[key]

    return checkpoint


@pytest.fixture(scope="session")
def tiny_adapter(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: TinyCheckpoints) -> TinyCheckpoints:
    """`tiny_adapter("llama", seed=1, r=4)` -> folder of a PEFT adapter of `tiny_checkpoint("llama")`."""
    root = tmp_path_factory.mktemp("tiny_adapters")
    built: dict[str, Path] = {}

    def adapter(name: str, *, seed: int, **lora: object) -> Path:
        from tests.tiny_models import save_tiny_adapter

        key = repr((name, seed, sorted(lora.items())))
        if key not in built:
            base = tiny_checkpoint(name)
            built[key] = save_tiny_adapter(base, root / f"{name}-{len(built)}", seed=seed, **lora)
        return built[key]

    return adapter
