"""Training runs in two processes: run by `torchrun` as `two_runs.py LLAMA BERT FOLDER`."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

warnings.simplefilter("ignore")


def recipes(llama: Path, bert: Path, *, rows: int) -> dict[str, dict[str, Any]]:
    """What is run, with so many rows per process: once in two processes, once in one with twice as many."""
    from tests.finetune.runs import recipe

    # nine rows in steps of four: one process has nothing to do in the last step of an epoch
    few = {"train": "other texts", "eval": "texts"}
    base = {"per_device_train_batch_size": rows, "max_steps": 5}
    return {
        "lora": recipe(llama, data=few, training={**base, "gradient_accumulation_steps": 1}),
        "samples": recipe(llama, optimizer={"mc_samples": 2}, training={**base, "save_steps": 2}),
        "classifier": recipe(bert, task="sequence_classification", optimizer={"lr": 0.1}, training=base),
        "full": recipe(llama, adapter=None, optimizer={"lr": 0.1}, training=base),
    }


def main() -> None:
    from mergekit_bayes.finetune.step import Stepper
    from tests.finetune.runs import recipe, run
    from tests.say import say

    llama, bert, folder = (Path(argument) for argument in sys.argv[1:])
    for name, content in recipes(llama, bert, rows=2).items():
        run(content, folder / name)
    own = {"noise": "per_process"}
    run(recipe(llama, optimizer=own, training={"per_device_train_batch_size": 2, "max_steps": 5}), folder / "own noise")

    # a signal that reaches one process stops both after the same step
    original, calls = Stepper.step, 0

    def step(self: Stepper, *arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments, **keywords)

    Stepper.step = step  # type: ignore[method-assign]
    try:
        run(recipes(llama, bert, rows=2)["samples"], folder / "stopped")
    except KeyboardInterrupt as stop:
        say(f"process {os.environ['RANK']}: {stop}")


if __name__ == "__main__":
    main()
