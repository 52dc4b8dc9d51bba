"""Which weights? Mixes of sources over a design, their scores, and the front between tasks.

    design.py, designs.py           which mixes to look at, and in which order
    plans.py                        the merge of every method, planned once for all weights
    surrogate.py, ratios.py         what the posteriors themselves predict at a mix, and at ten thousand of them;
                                    pieces.py, form.py, predict.py bring models and methods to these formulas
    families.py, family_figure.py   what richer posteriors would save one merge, by the same formulas
    tasks.py                        the data of the tasks, tokenised and batched once, and scores on it
    stacked.py                      several mixes of adapters in one forward pass
    evaluators.py, cache.py         evaluating by the fastest way there is, and never twice
    harness.py                      tasks of lm-eval-harness as evaluators
    sweep.py, evaluation.py         what is evaluated, in which order, by which process; adaptive.py: where next
    progress.py                     how far it is
    front.py, results.py            what is dominated, hypervolume, knee, max-min; points as data
    polynomial.py                   polynomials of the weights, fitted to scores
    references.py                   how far all that is from real runs
    page.py                         the front as a page to look around in
    figures.py, table.py, summary.py, costs.py, publish.py, folder.py   what is written and shown
    pick.py                         from a point of the front to its merge recipe
    run.py, describe.py             from a recipe to a folder; what that will be

The package can be called: `from mergekit_bayes import preview; preview("recipe.yaml", "out/")` runs `run.preview`, as
`mergekit_bayes.merge` runs a merge and for the same reason. Importing it costs nothing.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from mergekit_bayes.preview.run import preview

        return preview(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
