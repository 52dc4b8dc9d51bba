"""What one of several processes has to say, where all write to one pipe."""

from __future__ import annotations

import os


def say(line: object) -> None:
    """Writes a line at once; `print` may write its end later, when another process has begun a line of its own."""
    os.write(1, f"{line}\n".encode())
