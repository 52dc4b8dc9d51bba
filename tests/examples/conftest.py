"""The example's scripts import each other by name, as a script's own folder allows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "stdlib_lm"


@pytest.fixture(scope="session")
def example() -> Iterator[Path]:
    """Folder of the example, importable while its tests run."""
    sys.path.insert(0, str(EXAMPLE))
    yield EXAMPLE
    sys.path.remove(str(EXAMPLE))
