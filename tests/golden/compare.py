"""Comparison with committed texts: `REGENERATE_GOLDEN=1 pytest ...` writes them anew, to be read before a commit."""

from __future__ import annotations

import os
from pathlib import Path

GOLDEN = Path(__file__).parent
REGENERATE = "REGENERATE_GOLDEN"


def check_golden(path: Path, text: str) -> None:
    """Assert that `text` is what the file holds; with REGENERATE_GOLDEN set, write it instead."""
    if os.environ.get(REGENERATE):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"{path} is missing; write it with {REGENERATE}=1"
    assert text == path.read_text(encoding="utf-8"), f"differs from {path}; write it anew with {REGENERATE}=1"
