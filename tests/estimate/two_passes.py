"""One of two processes that share the rows of precision passes. Started by the tests."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mergekit_bayes.estimate import passes
from mergekit_bayes.estimate.rows import Feed
from tests.estimate.runs import recipe, run
from tests.say import say

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "fisher": {"num_examples": 11},
    "ekfac": {"estimator": {"name": "kfac", "eigenvalues": True}, "num_examples": 11, "max_memory": "6kB"},
    "gram": {"estimator": "gram", "num_examples": 1},  # nothing to do for one of them
}


def main(llama: Path, adapter: Path, folder: Path) -> None:
    """Run every recipe, and one that is cut short in both processes and goes on."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for name, keys in RECIPES.items():
        run(recipe(llama, adapter, **keys), folder / name)
    passes.SAVE_SECONDS = 0.0
    original, dealt = Feed.batches, []

    def batches(feed: Feed, block: list[int]) -> Any:
        dealt.append(block)
        if len(dealt) == 3:
            raise KeyboardInterrupt
        return original(feed, block)

    Feed.batches = batches  # type: ignore[method-assign]
    for _ in range(2):
        try:
            run(recipe(llama, adapter, **RECIPES["fisher"]), folder / "cut")
        except KeyboardInterrupt:
            say("interrupted")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
