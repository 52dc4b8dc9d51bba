"""Run a command and watch what it needs: wall time, peak resident memory and the anonymous part of it."""

from __future__ import annotations

import os
import resource
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.02


@dataclass(frozen=True)
class Watched:
    """What one process, with the processes it started, needed.

    Attributes:
        seconds: wall time from start to end of the process, imports included.
        cpu_seconds: processor time of the process tree, user and system; other load hardly changes it.
        peak_rss: bytes; largest sum of resident memory over the process tree, mapped files included.
        peak_anonymous: bytes; the same for memory that no file backs, which cannot be dropped under pressure.
        exit_code: of the process.
        output: its standard output.
        errors: its standard error.
    """

    seconds: float
    cpu_seconds: float
    peak_rss: int
    peak_anonymous: int
    exit_code: int
    output: str
    errors: str


def watch(command: Sequence[str], *, environment: Mapping[str, str] | None = None, expect: int = 0) -> Watched:
    """Run a command to its end.

    Args:
        command: program and arguments.
        environment: set in addition to that of this process.
        expect: the exit code that counts as success.

    Raises:
        RuntimeError: another exit code; with the end of the standard error.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        cpu = cpu_of_children()
        start = time.perf_counter()
        variables = {**os.environ, **(environment or {})}
        process = subprocess.Popen(command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=variables)
        peak_rss = peak_anonymous = 0
        while True:
            rss, anonymous = _memory(process.pid)
            peak_rss, peak_anonymous = max(peak_rss, rss), max(peak_anonymous, anonymous)
            try:
                process.wait(INTERVAL)
                break
            except subprocess.TimeoutExpired:
                continue
        seconds = time.perf_counter() - start
        cpu = cpu_of_children() - cpu
        out.seek(0)
        err.seek(0)
        output, errors = out.read().decode(errors="replace"), err.read().decode(errors="replace")
    if process.returncode != expect:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{errors[-4000:]}")
    return Watched(seconds, cpu, peak_rss, peak_anonymous, process.returncode, output, errors)


def cpu_of_children() -> float:
    """Processor seconds of all child processes that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _memory(pid: int) -> tuple[int, int]:
    """Resident and anonymous bytes of a process and everything below it, at this moment."""
    rss = anonymous = 0
    for member in _tree(pid):
        try:
            lines = Path(f"/proc/{member}/status").read_text().splitlines()
        except OSError:  # it has just ended
            continue
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        rss += _kibibytes(fields.get("VmRSS", "0 kB"))
        anonymous += _kibibytes(fields.get("RssAnon", "0 kB"))
    return rss, anonymous


def _kibibytes(text: str) -> int:
    return int(text.split(maxsplit=1)[0]) * 1024


def _tree(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        try:
            for thread in Path(f"/proc/{parent}/task").iterdir():
                found += [int(child) for child in (thread / "children").read_text().split()]
        except OSError:
            continue
    return found
