"""The checkpoints and the adapter that the recipes of `cases` name, built once per kind of input."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.parity.cases import Case
from tests.tiny_models import save_tiny_adapter, save_tiny_model

SOURCES = {"base": 0, "one": 1, "two": 2, "three": 3}
DRIFT = 1 / 64


def build_inputs(case: Case, root: Path) -> Path:
    """Write the models of a case below `root`, unless an earlier case has.

    Args:
        case: says architecture, dtype and shard size.
        root: a folder for all cases.

    Returns:
        The folder in which the case's recipe finds its models.
    """
    folder = root / f"{case.architecture}-{case.dtype}-{case.max_shard_size}"
    if not folder.exists():
        for name, seed in SOURCES.items():
            save_tiny_model(
                case.architecture,
                folder / name,
                seed=seed,
                drift=DRIFT if seed else 0.0,
                dtype=getattr(torch, case.dtype),
                max_shard_size=case.max_shard_size,
            )
    if "+adapter" in case.recipe and not (folder / "adapter").exists():
        save_tiny_adapter(folder / "base", folder / "adapter", seed=1, target_modules=["q_proj", "down_proj"])
    return folder
