"""Processes that wait for each other hear of one that is gone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, sys
from mergekit_bayes.errors import PeerError
from mergekit_bayes.merge.processes import Processes

processes = Processes.from_environment()
with processes.together():
    print(processes.gathered(10 + processes.rank), flush=True)
    if processes.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        processes.gathered(None)
    except PeerError as error:
        print(error, flush=True)
        raise
"""


@pytest.mark.slow
def test_a_killed_peer_is_heard_of() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**shared, "RANK": rank},
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    (out, err), (other, _) = (process.communicate(timeout=120) for process in running)
    assert [process.returncode for process in running] == [1, -9]
    assert other == "[10, 11]\n"
    exchanged, told = out.splitlines()
    assert exchanged == "[10, 11]"
    assert told.startswith("process 0 of 2: another process is gone: ")
    assert "PeerError" in err
