"""Two processes that share the rows find what one finds, to the bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.evaluate import two_processes
from tests.evaluate.runs import run
from tests.harness_tasks import write_tasks


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """As in the processes: several threads add up in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def two(llama: Path, tuned: Path, bert: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What two processes leave behind, and what they said."""
    folder = tmp_path_factory.mktemp("two")
    write_tasks(folder / "tasks")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, two_processes.__file__, *map(str, (llama, tuned, bert, folder))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(__file__).parents[2])},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_two_processes_find_what_one_finds(
    two: tuple[Path, str], llama: Path, tuned: Path, bert: Path, tmp_path: Path
) -> None:
    run(two_processes.language(llama, tuned), tmp_path / "language")
    run(two_processes.classes(bert), tmp_path / "classes")
    run(two_processes.questions(llama), tmp_path / "questions")
    run(two_processes.harness(llama, tuned, two[0] / "tasks"), tmp_path / "harness")
    for name in ("language", "classes", "questions", "harness"):
        assert content(two[0] / name) == content(tmp_path / name)
    assert sorted(two[1].split("\n")) == ["", "interrupted", "interrupted", "no results", "results"]


@pytest.mark.slow
def test_one_process_goes_on_with_what_two_had_finished(
    two: tuple[Path, str], llama: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_bayes.evaluate import open_model
    from mergekit_bayes.evaluate.measure import measure_block

    counts = dict.fromkeys(("whole", "cut"), 0)

    def counted(name: str) -> None:
        def measured(*arguments: object, **options: object) -> object:
            counts[name] += 1
            return measure_block(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(open_model, "measure_block", measured)

    counted("whole")
    run(two_processes.language(llama, tuned), tmp_path / "whole")
    counted("cut")
    run(two_processes.language(llama, tuned), two[0] / "cut")
    assert content(two[0] / "cut") == content(tmp_path / "whole")
    assert counts["cut"] == counts["whole"] - 4
