"""Every code block of the README runs, in the order of the page, in one folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"

# They set up an environment, which no test should do: run.sh is what runs this test, both others call what run.sh
# calls for that, and tests/examples runs the program behind the quickstart.
SET_UP = ("bash examples/stdlib_lm/quickstart.sh", "bash tests/run.sh", "bash install.sh evaluate")


@dataclass(frozen=True)
class Block:
    language: str
    text: str


def _blocks() -> list[Block]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [Block(language, text) for language, text in found]


def test_every_block_says_what_it_is() -> None:
    assert {block.language for block in _blocks()} == {"bash", "yaml", "python", "text"}
    assert [block.text.strip() for block in _blocks() if block.text.strip() in SET_UP] == list(SET_UP)


@pytest.mark.parametrize("command", SET_UP)
def test_set_up_commands_name_scripts_that_parse(command: str) -> None:
    script = ROOT / command.split()[1]
    subprocess.run(["bash", "-n", str(script)], check=True)


@pytest.mark.slow
def test_blocks_run_in_order(tmp_path: Path) -> None:
    """A YAML block is the file its first line names; bash and Python blocks run."""
    for folder in ("examples", "recipes"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    ran = 0
    for block in _blocks():
        if block.language == "yaml":
            name = block.text.splitlines()[0].removeprefix("# ")
            (tmp_path / name).write_text(block.text)
        elif block.text.strip() not in SET_UP and block.language != "text":
            _run(block, tmp_path)
            ran += 1
    assert ran >= 3


# peft 0.21 reads this property of transformers 5.23 models when an adapter is loaded
PEFT_ASKS = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


def _run(block: Block, folder: Path) -> None:
    python = [sys.executable, "-W", "error", "-W", PEFT_ASKS, "-c"]
    programs = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": python}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = [*programs[block.language], block.text]
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{block.text}\n{done.stdout}\n{done.stderr}"


def test_methods_in_the_readme_are_the_registered_ones() -> None:
    from mergekit_bayes import method_names

    table = README.read_text().split("### Methods")[1].split("### Recipes")[0]
    rows = re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)
    assert sorted(rows) == sorted(method_names())


def test_recipe_keys_in_the_readme_are_those_of_the_recipe() -> None:
    from mergekit_bayes.recipe.merge import SPECS

    table = README.read_text().split("### Recipes")[1].split("### LoRA")[0]
    words = set(re.findall(r"\w+", " ".join(re.findall(r"^\| (`[^|]*) \|", table, flags=re.MULTILINE))))
    missing = [key for spec in SPECS.values() for key in spec.model_fields if key not in words]
    assert missing == []


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
