"""The merge method that CONTRIBUTING.md shows how to write is a merge method."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from mergekit_bayes.merge import registry
from mergekit_bayes.merge.registry import MergeMethod, get_method, methods
from tests.contract.laws import BAYESIAN_LAWS, ELEMENT_LAWS, LAWS, Law, agrees_with

DOCUMENT = Path(__file__).parents[2] / "CONTRIBUTING.md"


def _module(path: str, folder: Path) -> ModuleType:
    """Import the code block of the document that opens with `# path`."""
    blocks = re.findall(r"^```python\n# (\S+)\n(.*?)^```$", DOCUMENT.read_text(), flags=re.MULTILINE | re.DOTALL)
    file = folder / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(dict(blocks)[path])
    spec = importlib.util.spec_from_file_location("example_" + path.replace("/", "_").removesuffix(".py"), file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[MergeMethod, ModuleType]]:
    folder = tmp_path_factory.mktemp("example")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_methods", {method.name: method for method in methods()})
        _module("mergekit_bayes/merge/methods/magmax.py", folder)
        yield get_method("magmax"), _module("tests/oracles/magmax.py", folder)


@pytest.mark.parametrize("law", [*LAWS, *BAYESIAN_LAWS, *ELEMENT_LAWS], ids=lambda law: law.__name__)
def test_the_example_keeps_every_law(example: tuple[MergeMethod, ModuleType], law: Law) -> None:
    law(example[0])


def test_the_oracle_of_the_example_agrees(example: tuple[MergeMethod, ModuleType]) -> None:
    method, oracle = example
    agrees_with(method, oracle.oracle)


def test_the_example_is_listed_like_any_other(example: tuple[MergeMethod, ModuleType]) -> None:
    assert example[0] in methods()
    assert example[0].summary == "Base plus, for every entry, the task vector that moved it furthest."


def test_paths_named_in_the_document_exist() -> None:
    text = (
        DOCUMENT.read_text()
        .replace("mergekit_bayes/merge/methods/magmax.py", "")
        .replace("mergekit_bayes/preview/", "")
    )
    paths = re.findall(r"`((?:mergekit_bayes|tests)/[\w/.]+)`", text)
    assert len(paths) >= 4
    assert [path for path in paths if not (DOCUMENT.parent / path).exists()] == []
