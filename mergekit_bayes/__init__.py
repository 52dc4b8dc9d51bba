"""Merge fine-tuned models as posteriors: a mean and a precision for every weight.

    merge                 run a recipe
    plan_merge            what a recipe would do, from headers alone
    load_recipe           read and check a recipe
    load_posterior        a checkpoint or adapter with its sidecar, as one posterior per tensor
    Diagonal, Isotropic   posteriors of independent weights and their algebra
    Kronecker, Mixture    posteriors of linear layers, and several posteriors of one task
    merge_posteriors      the rule: natural parameters add
    mismatch              what a merge is predicted to cost a source
    merge_method          register a merge method of your own
    Parameter             declare a parameter of it
    method_names          the registered methods
    finetune              run a fine-tuning recipe
    estimate_precision    the precision of a model or adapter that was trained without one
    evaluate              run an evaluation recipe
    preview               run a preview recipe
    IVON                  an optimizer that leaves a posterior behind
    sample_posterior      put a sample of a posterior into a loaded model, for a while
    MergekitBayesError    the root of every error this library raises on purpose

Names are loaded when they are first used, so importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mergekit_bayes.errors import MergekitBayesError
    from mergekit_bayes.estimate.run import estimate_precision
    from mergekit_bayes.evaluate.run import evaluate
    from mergekit_bayes.finetune import IVON
    from mergekit_bayes.finetune.run import finetune
    from mergekit_bayes.merge.load import load_posterior
    from mergekit_bayes.merge.plan import plan_merge
    from mergekit_bayes.merge.registry import Parameter, merge_method, method_names
    from mergekit_bayes.merge.run import merge
    from mergekit_bayes.posterior import Diagonal, Isotropic, Kronecker, Mixture, merge_posteriors, mismatch
    from mergekit_bayes.predict import sample_posterior
    from mergekit_bayes.preview.run import preview
    from mergekit_bayes.recipe import load_recipe

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - in the order of `sorted`, which a test checks
    "Diagonal",
    "IVON",
    "Isotropic",
    "Kronecker",
    "MergekitBayesError",
    "Mixture",
    "Parameter",
    "estimate_precision",
    "evaluate",
    "finetune",
    "load_posterior",
    "load_recipe",
    "merge",
    "merge_method",
    "merge_posteriors",
    "method_names",
    "mismatch",
    "plan_merge",
    "preview",
    "sample_posterior",
]

_HOMES = {
    "Diagonal": "mergekit_bayes.posterior",
    "IVON": "mergekit_bayes.finetune",
    "Isotropic": "mergekit_bayes.posterior",
    "Kronecker": "mergekit_bayes.posterior",
    "MergekitBayesError": "mergekit_bayes.errors",
    "Mixture": "mergekit_bayes.posterior",
    "Parameter": "mergekit_bayes.merge.registry",
    "estimate_precision": "mergekit_bayes.estimate.run",
    "load_posterior": "mergekit_bayes.merge.load",
    "load_recipe": "mergekit_bayes.merge.load",
    "merge_method": "mergekit_bayes.merge.registry",
    "merge_posteriors": "mergekit_bayes.posterior",
    "method_names": "mergekit_bayes.merge.registry",
    "mismatch": "mergekit_bayes.posterior",
    "plan_merge": "mergekit_bayes.merge.plan",
    "sample_posterior": "mergekit_bayes.predict",
}


def __getattr__(name: str) -> Any:
    if name in ("evaluate", "finetune", "merge", "preview"):  # packages that can be called
        return importlib.import_module(f"mergekit_bayes.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
