"""Stop a small merge at every system call in turn and look at what is left: run as `crashes.py SCENARIO FAULT`.

A process of its own, single-threaded and without torch, so that it can fork one victim per system call
cheaply. Prints one JSON object: how many system calls were tried, and every broken promise found.

Scenarios are what the victim finds: nothing, an empty folder, a former output to replace, a former run of
the same or of another job to continue from or to clear away, and a swap of folders that was cut in two.
Faults are what happens at the chosen call: a kill before it (after half of it, if it writes), a kill right
after it, the same and another kill somewhere in the rerun, an error of the device, Ctrl-C. The last rerun
continues the same job after one half of the calls and starts another after the other half.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mergekit_bayes.checkpoint.output import OutputFolder
from mergekit_bayes.checkpoint.work import WorkFolder
from mergekit_bayes.checkpoint.writer import ShardWriter, TensorEntry, layout_shards
from mergekit_bayes.errors import OutputError

CALLS = ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "chmod", "fsync", "ftruncate", "pwrite")
LAYOUTS = layout_shards([TensorEntry(f"t{i}", "U8", (40,)) for i in range(2)], max_shard_bytes=40)
OLD = {"model.safetensors": b"old weights", "config.json": b"{}", "stale.txt": b"old"}
SCENARIOS = ("absent", "empty", "former", "same job", "other job", "cut swap")
FAULTS = ("kill before", "kill after", "kill twice", "error", "interrupt")


def expected() -> dict[str, bytes]:
    files = {layout.filename: layout.header + bytes(range(40)) for layout in LAYOUTS}
    return {**files, "config.json": b'{"new": true}'}


def merge(target: Path, *, overwrite: bool, job: str = "1") -> None:
    with OutputFolder(target, overwrite=overwrite, inputs=[], job=job) as output:
        for layout in LAYOUTS:
            if output.finished(layout.filename) is None:
                with ShardWriter(output.staging / layout.filename, layout) as writer:
                    (entry,) = layout.entries
                    writer.write(entry.name, 15, bytes(range(15, 40)))
                    writer.write(entry.name, 0, bytes(range(15)))
                output.finish(layout.filename, {})
        (output.staging / "config.json").write_bytes(expected()["config.json"])
        output.publish()


def in_child(action: Callable[[], None]) -> int:
    """Run `action` in a fork. Returns 0, 3 for `OutputError`, 4 for Ctrl-C, 1 for other exceptions, or -signal."""
    child = os.fork()
    if child == 0:
        try:
            action()
            code = 0
        except OutputError:
            code = 3
        except KeyboardInterrupt:
            code = 4
        except BaseException:
            sys.excepthook(*sys.exc_info())
            sys.stderr.flush()
            code = 1
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fail_at(number: int, fault: str, pipe: int) -> None:
    """Arrange that system call `number`, counted from now, does not go as hoped, and says so to `pipe`."""
    count = 0

    def wrap(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count != number:
                return call(*args, **options)
            os.write(pipe, b"!")
            if fault == "error":
                raise OSError(errno.EIO, "Input/output error")
            if fault == "kill before":
                if name == "pwrite":
                    call(args[0], args[1][: len(args[1]) // 2], *args[2:])
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                result = call(*args, **options)
            finally:
                if fault in ("kill after", "kill twice"):
                    os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt(result)

        return wrapped

    for name in CALLS:
        setattr(os, name, wrap(name, getattr(os, name)))
    fcntl.flock = wrap("flock", fcntl.flock)


def killed_when_publishing(target: Path, job: str) -> None:
    WorkFolder.publish = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    merge(target, overwrite=True, job=job)


def killed_between_renames(target: Path) -> None:
    rename = os.rename

    def stop(source: Any, destination: Any) -> None:
        if Path(destination) == target:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, destination)

    os.rename = stop  # type: ignore[assignment]
    merge(target, overwrite=True)


def set_up(scenario: str, target: Path) -> None:
    if scenario == "empty":
        target.mkdir()
    if scenario in ("former", "cut swap"):
        target.mkdir()
        for name, content in OLD.items():
            (target / name).write_bytes(content)
    if scenario in ("same job", "other job"):
        assert in_child(lambda: killed_when_publishing(target, "1" if scenario == "same job" else "2")) == -9
    if scenario == "cut swap":
        assert in_child(lambda: killed_between_renames(target)) == -9
        assert not target.exists()


def content(folder: Path) -> dict[str, bytes] | None:
    return {p.name: p.read_bytes() for p in folder.iterdir()} if folder.is_dir() else None


def complaints(scenario: str, fault: str, target: Path, code: int) -> Iterator[str]:
    """What is wrong with the state a fault left behind."""
    before: dict[str, bytes] | None = {"empty": {}, "former": OLD, "cut swap": OLD}.get(scenario)
    now = content(target)
    swapped = now is None and content(target.parent / f".{target.name}.partial" / "replaced") == OLD
    excused = before == OLD and swapped and ("kill" in fault or scenario == "cut swap")
    if now not in (before, expected()) and not excused:
        yield f"the target holds {now}"
    if fault == "error" and code not in (0, 3):
        yield f"an error of the device ended the merge with {code}"
    if fault == "interrupt" and code not in (0, 3, 4):
        yield f"Ctrl-C ended the merge with {code}"
    if code == 0 and now != expected():
        yield f"success was claimed with {now}"
    strange = {p.name for p in target.parent.iterdir()} - {target.name, f".{target.name}.partial"}
    if strange:
        yield f"left beside the target: {strange}"


def rerun(target: Path, job: str) -> None:
    # Whoever finds a finished output, or had a former one, asks for it to be replaced.
    merge(target, overwrite=bool(content(target)) or content(target) is None, job=job)


def killed_rerun(target: Path, number: int) -> None:
    fail_at(number, "kill before", os.open(os.devnull, os.O_WRONLY))
    rerun(target, "1")


def complaints_after_rerun(target: Path, job: str) -> Iterator[str]:
    code = in_child(lambda: rerun(target, job))
    if code:
        yield f"the rerun ended with {code}"
    if content(target) != expected():
        yield f"the rerun left {content(target)}"
    if [p.name for p in target.parent.iterdir()] != [target.name]:
        yield f"the rerun left {sorted(p.name for p in target.parent.iterdir())}"


def try_one(scenario: str, fault: str, number: int, parent: Path) -> tuple[bool, list[str]]:
    """Returns whether the merge got as far as call `number`, and what went wrong."""
    target = parent / "out"
    set_up(scenario, target)
    reader, signal_pipe = os.pipe()

    def victim() -> None:
        fail_at(number, fault, signal_pipe)
        merge(target, overwrite=scenario in ("former", "cut swap"))

    code = in_child(victim)
    os.close(signal_pipe)
    reached = os.read(reader, 1) == b"!"
    os.close(reader)
    found = [] if "kill" not in fault or code == (-9 if reached else 0) else [f"ended with {code}"]
    found += complaints(scenario, fault, target, code)
    if fault == "kill twice" and reached:
        in_child(lambda: killed_rerun(target, 1 + number * 7 % 60))
        found += complaints(scenario, fault, target, -9)
    found += complaints_after_rerun(target, "1" if (number + FAULTS.index(fault)) % 2 else "2")
    return reached, [f"{scenario}, {fault} at call {number}: {text}" for text in found]


def main(scenario: str, fault: str) -> None:
    fast = Path("/dev/shm")  # synchronising costs nothing there
    number, reached = 0, True
    problems: list[str] = []
    while reached:
        number += 1
        root = Path(tempfile.mkdtemp(prefix="crashes-", dir=fast if os.access(fast, os.W_OK) else None))
        try:
            reached, found = try_one(scenario, fault, number, root)
        finally:
            shutil.rmtree(root)
        problems += found
    print(json.dumps({"calls": number - 1, "problems": problems}))


if __name__ == "__main__":
    main(*sys.argv[1:])
