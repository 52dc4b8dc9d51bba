"""Passes that kill their own process before a batch: run as `killed_pass.py MODEL ADAPTER FOLDER MOMENT...`.

A process of its own, so that it can fork one victim per moment after importing everything once.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mergekit_bayes.estimate import passes
from mergekit_bayes.estimate.folder import SidecarFolder
from mergekit_bayes.estimate.rows import Feed
from tests.estimate.runs import recipe, run
from tests.finetune.killed import in_child


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
    import peft  # noqa: F401 - once, for all victims
    import transformers  # noqa: F401

    model, adapter, folder = (Path(argument) for argument in sys.argv[1:4])
    for moment in sys.argv[4:]:
        print(moment, in_child(partial(main, model, adapter, folder / moment, moment)), flush=True)
