"""The merge methods, one file each: a kernel, its equation, its paper.

    linear              weighted average of the means (model soup)
    task_arithmetic     base plus weighted task vectors
    hessian_weighted    precision-weighted average without a base (alias `fisher`)
    gradient_matching   base plus precision-weighted task vectors
    posterior           the rule itself, for whatever precisions there are

Each of these is the rule of `mergekit_bayes.posterior.rule` with special precisions; the tests hold them to that.
Others look at task vectors alone, for comparison:

    ties                trimmed task vectors, averaged where their signs agree
    tsv_m               the leading singular triples of every task, decorrelated
    iso_c               the sum of task vectors with a flat spectrum
    iso_cts             the same, with directions kept for every task
    knots               TIES in a basis that the task vectors share

Importing this package imports every file in it, in sorted order, and then what other packages offer in the
entry-point group `mergekit_bayes.merge_methods`; there is no list to edit.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil

from mergekit_bayes.errors import MethodError

ENTRY_POINTS = "mergekit_bayes.merge_methods"


def _import_siblings() -> None:
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        importlib.import_module(f"{__name__}.{name}")


def _import_entry_points() -> None:
    found = importlib.metadata.entry_points(group=ENTRY_POINTS)
    for entry in sorted(found, key=lambda entry: (entry.name, entry.value)):
        try:
            entry.load()
        except MethodError:
            raise
        except Exception as error:
            # Whatever a foreign module raises, the reader needs to know which package to mend or remove.
            raise MethodError(
                f"entry point `{entry.name} = {entry.value}` of {ENTRY_POINTS} cannot be loaded: {error!r}"
            ) from error


_import_siblings()
_import_entry_points()
