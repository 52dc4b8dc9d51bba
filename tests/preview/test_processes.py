"""Two processes find what one process finds."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mergekit_bayes.preview.run import preview
from tests.preview.conftest import TABLES, Recipes

PROGRAM = """
import json, sys
from pathlib import Path
from mergekit_bayes.preview.run import preview
content, tables, out = (json.loads(text) for text in sys.argv[1:4])
preview(content, out, tables=tables)
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.slow
def test_two_processes_find_what_one_finds(recipe: Recipes, tmp_path: Path) -> None:
    content = recipe(methods=["task_arithmetic", "posterior"])
    alone = preview(content, tmp_path / "alone", tables=TABLES).front
    arguments = [
        sys.executable,
        "-c",
        PROGRAM,
        json.dumps(content),
        json.dumps(TABLES),
        json.dumps(str(tmp_path / "two")),
    ]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    running = [
        subprocess.Popen(arguments, env={**shared, "RANK": rank, "LOCAL_RANK": rank}, cwd=Path(__file__).parents[2])
        for rank in ("0", "1")
    ]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    both = json.loads((tmp_path / "two" / "front.json").read_text())
    assert sorted(path.name for path in (tmp_path / "two").glob("*.jsonl")) == [
        "evaluations.1.jsonl",
        "evaluations.jsonl",
    ]
    for mine, theirs in zip(alone["points"], both["points"], strict=True):
        assert mine["evaluated"] == theirs["evaluated"]
        assert mine["surrogate"] == theirs["surrogate"]
    assert alone["tiers"] == both["tiers"]
