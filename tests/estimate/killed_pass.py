"""A pass that kills its own process before a batch. Started by the tests."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mergekit_bayes.estimate import passes
from mergekit_bayes.estimate.folder import SidecarFolder
from mergekit_bayes.estimate.rows import Feed
from tests.estimate.runs import recipe, run


def main(llama: Path, adapter: Path, out: Path, moment: str) -> None:
    torch.set_num_threads(1)
    passes.SAVE_SECONDS = 0.0
    dealt, original, publish = [], Feed.batches, SidecarFolder.publish

    def batches(feed: Feed, block: list[int]) -> Iterator[dict[str, Any]]:
        for batch in original(feed, block):
            if str(len(dealt)) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            dealt.append(batch)
            yield batch

    def dying(folder: SidecarFolder, names: list[str]) -> None:
        if moment == "publish":
            (folder.staging / names[0]).replace(folder.target / names[0])
            os.kill(os.getpid(), signal.SIGKILL)
        publish(folder, names)

    Feed.batches, SidecarFolder.publish = batches, dying  # type: ignore[method-assign, assignment]
    run(recipe(llama, adapter), out)


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:4]), sys.argv[4])
