"""A sound merge for every test to break."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bad_input.site import Site, assert_refused, write_site

Refused = Callable[..., str]


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    """Folders and a recipe that merge without complaint; the current folder is one of them."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return write_site(tmp_path)


@pytest.fixture
def refused(site: Site, capsys: pytest.CaptureFixture[str]) -> Refused:
    """`refused("part of the message", ...)`: see `assert_refused`."""

    def check(*fragments: str, options: tuple[str, ...] = (), file: Path | None = None) -> str:
        return assert_refused(site, *fragments, capsys=capsys, options=options, file=file)

    return check
