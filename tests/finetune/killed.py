"""Kills training runs at chosen moments and lets each continue: run as `killed.py BASE FOLDER`.

A process of its own, so that it can fork one victim per moment after importing everything once. A moment is a call of
`os.fsync`, which only checkpoints and the publication make, or an optimizer step, by its number.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

TRAINING = {"max_steps": 12, "save_steps": 4, "logging_steps": 1}
MOMENTS = [("fsync", 2), ("fsync", 9), ("fsync", 14), ("fsync", 19), ("fsync", 27), ("step", 6), ("fsync", 45)]


def victim(base: Path, out: Path, moment: tuple[str, int] | None) -> None:
    from mergekit_bayes.finetune.step import Stepper
    from tests.finetune.runs import recipe, run

    calls = 0

    def counted(original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **keywords: object) -> object:
            nonlocal calls
            calls += 1
            if moment is not None and calls == moment[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **keywords)

        return call

    if moment is not None and moment[0] == "fsync":
        os.fsync = counted(os.fsync)  # type: ignore[assignment]
    elif moment is not None:
        Stepper.step = counted(Stepper.step)  # type: ignore[method-assign,assignment]
    run(recipe(base, training=TRAINING), out)


def in_child(action: Callable[[], None]) -> int:
    """Runs in a fork; 0, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    import peft  # noqa: F401 - once, for all victims
    import transformers  # noqa: F401

    import mergekit_bayes.finetune.run  # noqa: F401

    base, folder = Path(sys.argv[1]), Path(sys.argv[2])
    for number, moment in enumerate(MOMENTS):
        out = folder / f"{number}"
        status = in_child(lambda: victim(base, out, moment))  # noqa: B023 - called at once
        left = out.parent / f".{out.name}.partial" / "staging" / "checkpoints"
        names = sorted(path.name for path in left.iterdir()) if left.exists() else []
        again = in_child(lambda: victim(base, out, None))  # noqa: B023
        print(moment, status, names, again, flush=True)


if __name__ == "__main__":
    main()
