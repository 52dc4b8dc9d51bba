"""What the command says and returns when it cannot do its work."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from mergekit_bayes.errors import MergekitBayesError

REFUSED = 2
INTERRUPTED = 130


@contextmanager
def exit_codes(*, interrupted: str = "interrupted") -> Iterator[None]:
    """Turn the library's errors into their message and exit code 2, Ctrl-C into 130.

    Any other exception is a bug and keeps its traceback.

    Args:
        interrupted: what to say after Ctrl-C, unless the interrupt itself says more.
    """
    try:
        yield
    except MergekitBayesError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(REFUSED) from None
    except KeyboardInterrupt as interrupt:
        print(f"\n{str(interrupt) or interrupted}", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
