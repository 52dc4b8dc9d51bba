"""What all merge tests share."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk takes most of the time of a tiny merge; that it is asked to sync is tested elsewhere."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
