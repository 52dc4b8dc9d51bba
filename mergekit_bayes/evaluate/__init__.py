"""Recipes of kind `evaluate`: from models and data to scores with intervals, a table and figures.

    candidate.py        a model known by its headers: on disk; merged.py: a merge that is made in memory
    candidates.py       all of them; what cannot be evaluated together is refused
    encodings.py        rows as each of the tokenizers reads them, once for all models that share it
    variants.py         the ways a model is looked at: its mean, samples of its posterior, pruned
    measure.py          what a block of rows adds, per row
    open_model.py       a model in memory, when something has to be computed
    harnessed.py        tasks of lm-eval-harness, at the mean of a model
    session.py          all of it, one block after the other, shared by processes (processes.py)
    store.py            blocks that are known already: of an earlier run, of another process
    scores.py           rows to scores, and to intervals between models
    outcome.py          numbers of one model with what they are to be read with
    results.py          everything found, as plain data (intervals.py, reliability.py)
    measured.py         what a merge cost, beside what its report predicted
    table.py, harness_table.py, pictures.py, progress.py, describe.py     what is seen of it
    run.py              from a recipe to a folder

Each model is looked at as often as its recipe asks, one after the other; rows are tokenised once.

The package can be called: `from mergekit_bayes import evaluate; evaluate("recipe.yaml", "scores/")` runs
`run.evaluate`, as `mergekit_bayes.merge` runs a merge and for the same reason. Importing it costs nothing.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from mergekit_bayes.evaluate.run import evaluate

        return evaluate(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
