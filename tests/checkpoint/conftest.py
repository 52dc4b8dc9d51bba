"""Disks for tests of what happens when a disk refuses."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 4 MB: the only way to meet a full disk as users meet it."""
    mount = tmp_path / "small disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(mount)]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no `mount` on this machine")
    if result.returncode:
        pytest.skip(f"mounting a small file system needs root: {result.stderr.strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)
