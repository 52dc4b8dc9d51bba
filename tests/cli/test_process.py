"""The command as a process of its own: how fast it starts, what it imports, how it ends."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TinyCheckpoints

HEAVY = ("torch", "transformers", "peft", "numpy", "safetensors")
PROGRAM = f"""
import sys
from mergekit_bayes.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print("heavy:", [name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""


def start(*arguments: object, program: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *(["-c", program] if program else ["-m", "mergekit_bayes"])]
    return subprocess.run([*command, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture
def recipe(tmp_path: Path, tiny_checkpoint: TinyCheckpoints) -> Path:
    models = [tiny_checkpoint("llama", seed=seed, drift=0.01) for seed in (1, 2)]
    path = tmp_path / "r.yaml"
    path.write_text(
        "merge_method: linear\nmodels:\n"
        + "".join(f"  - {{model: {model}, parameters: {{weight: 1}}}}\n" for model in models)
    )
    return path


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["--version"], ["methods"], ["methods", "fisher"]]
)
def test_nothing_heavy_is_imported_to_answer_questions(arguments: list[str]) -> None:
    done = start(*arguments, program=PROGRAM)
    assert done.returncode == 0
    assert done.stderr == "heavy: []\n"


def test_nothing_heavy_is_imported_to_refuse_a_recipe(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "sede: 1\n")
    done = start(recipe, "out", program=PROGRAM)
    assert done.returncode == 2
    assert done.stderr == f"{recipe}:5:1  sede: unknown key. Did you mean `seed`?\nheavy: []\n"


def test_nothing_heavy_is_imported_to_plan(recipe: Path) -> None:
    done = start("plan", recipe, program=PROGRAM)
    assert done.stderr == "heavy: []\n"
    assert done.returncode == 0
    assert "model.layers.0.self_attn.q_proj.weight" in done.stdout


def test_help_takes_less_than_half_a_second() -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert start("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # processor time: what a quiet machine would take
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5


def test_an_interrupt_ends_without_a_traceback(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    os.mkfifo(path)
    command = [sys.executable, "-m", "mergekit_bayes", "plan", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        writer = os.open(path, os.O_WRONLY)  # returns when the command has opened the recipe
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        os.close(writer)
    assert process.returncode == 130
    assert (out, err) == ("", "\ninterrupted\n")


def test_a_closed_pipe_ends_without_a_traceback() -> None:
    command = [sys.executable, "-m", "mergekit_bayes", "methods", "posterior"]
    reader, writer = os.pipe()
    os.close(reader)
    with subprocess.Popen(command, stdout=writer, stderr=subprocess.PIPE, text=True) as process:
        os.close(writer)
        _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
