"""Two processes find what one process finds."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mergekit_bayes.preview.run import preview
from tests.preview.conftest import TABLES, Recipes

PROGRAM = """
import json, sys
import torch.distributed
from mergekit_bayes.preview.run import preview
jobs, tables = (json.loads(text) for text in sys.argv[1:3])
torch.distributed.init_process_group("gloo")
for content, out in jobs:
    preview(content, out, tables=tables)
torch.distributed.destroy_process_group()
"""


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def in_two_processes(jobs: list[tuple[dict[str, Any], Path]]) -> None:
    """Runs previews one after the other, each in both processes."""
    told = [json.dumps([(content, str(out)) for content, out in jobs]), json.dumps(TABLES)]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *told],
            env={**shared, "RANK": rank, "LOCAL_RANK": rank},
            cwd=Path(__file__).parents[2],
        )
        for rank in ("0", "1")
    ]
    assert [process.wait(timeout=300) for process in running] == [0, 0]


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line]


def same_but_for_seconds(alone: dict[str, Any], both: Path) -> None:
    found = json.loads((both / "front.json").read_text())
    for mine, theirs in zip(alone["points"], found["points"], strict=True):
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}
    assert alone["tiers"] == found["tiers"]


@pytest.mark.slow
def test_two_processes_find_what_one_finds(recipe: Recipes, tmp_path: Path) -> None:
    """Mixes are dealt out while there is one for each process; the rows of what is left over are."""
    even = recipe(methods=["task_arithmetic", "posterior"])  # seven groups beside base and experts
    odd = recipe(fidelity="evaluated")  # base and experts, and then three mixes: a group each time
    failing = recipe(methods=["posterior"], fidelity="evaluated", design={"kind": "list", "weights": [[1, 1], [-9, 0]]})
    one_more = recipe(fidelity="evaluated", design={"partitions": 5})
    jobs = [(even, "even"), (odd, "odd"), (failing, "failing"), (one_more, "odd")]
    alone = [preview(content, tmp_path / "alone" / name, tables=TABLES).front for content, name in jobs]
    in_two_processes([(content, tmp_path / "two" / name) for content, name in jobs])
    for front, name in ((alone[0], "even"), (alone[2], "failing"), (alone[3], "odd")):
        same_but_for_seconds(front, tmp_path / "two" / name)
    by_rank = [records(tmp_path / "two" / "even" / name) for name in ("evaluations.jsonl", "evaluations.1.jsonl")]
    assert min(map(len, by_rank)) > 3
    assert not {each["key"] for each in by_rank[0]} & {each["key"] for each in by_rank[1]}
    by_rank = [records(tmp_path / "two" / "odd" / name) for name in ("evaluations.jsonl", "evaluations.1.jsonl")]
    assert list(map(len, by_rank)) == [3 + 3 + 3, 1]  # the second sweep has four new mixes, two groups
    errors = [point.get("error", "") for point in alone[2]["points"]]
    assert [error.partition(":")[0] for error in errors] == ["", "NonPositivePrecisionError"]
