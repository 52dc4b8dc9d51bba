"""`python -m mergekit_bayes` is the command `bayes-merge`."""

from __future__ import annotations

import importlib

if __name__ == "__main__":
    # by name: type checkers cannot see that the folder `cli` installs as a part of this package
    importlib.import_module("mergekit_bayes.cli.main").main()
