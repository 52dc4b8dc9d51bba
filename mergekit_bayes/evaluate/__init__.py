"""What a posterior predicts: samples of it, averaged probabilities, pruning by signal to noise, and scores.

Works on any model in memory together with precisions: a sidecar, its folder, or a mapping.

    attach.py        attach_posterior: which precision belongs to which parameter; with
                     names.py (weights by their names in files), precisions.py (from memory or disk) and
                     belongs.py (are these the weights that the precisions describe?)
    sampling.py      sample_posterior: the model holds a sample while a context lasts
    classes.py       predict_probabilities: of classes, averaged over samples
    tokens.py        predict_next_tokens: the same for language models; both with
                     batches.py (what goes in), draws.py (which weights) and average.py (of probabilities)
    temperature.py   choose_temperature: how wide to sample, by validation data
    pruning.py       prune_posterior: zero where the mean is small beside its uncertainty; smallest.py finds where
    scores.py        accuracy, nll, brier, ece, accuracy at coverage
    bootstrap.py     paired_interval: is one model better than another, or is it the choice of examples?
    rows.py          rows of files as batches of a model's arguments
    runner/          recipes of kind `evaluate`: models and data to a table, results and figures

The package can be called: `from mergekit_bayes import evaluate; evaluate("recipe.yaml", "scores/")` runs
`runner.run.evaluate`, as `mergekit_bayes.merge` runs a merge and for the same reason.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from mergekit_bayes.evaluate.attach import AttachedPosterior, attach_posterior
from mergekit_bayes.evaluate.bootstrap import Interval, paired_interval, paired_intervals
from mergekit_bayes.evaluate.classes import ClassPrediction, predict_probabilities
from mergekit_bayes.evaluate.precisions import read_precisions
from mergekit_bayes.evaluate.pruning import Pruning, prune_posterior
from mergekit_bayes.evaluate.sampling import sample_posterior
from mergekit_bayes.evaluate.scores import BINS, Score, calibration_gaps, class_scores, selective_accuracy, token_scores
from mergekit_bayes.evaluate.temperature import ChosenTemperature, choose_temperature
from mergekit_bayes.evaluate.tokens import TokenPrediction, VocabularyPrediction, predict_next_tokens

__all__ = [
    "BINS",
    "AttachedPosterior",
    "ChosenTemperature",
    "ClassPrediction",
    "Interval",
    "Pruning",
    "Score",
    "TokenPrediction",
    "VocabularyPrediction",
    "attach_posterior",
    "calibration_gaps",
    "choose_temperature",
    "class_scores",
    "paired_interval",
    "paired_intervals",
    "predict_next_tokens",
    "predict_probabilities",
    "prune_posterior",
    "read_precisions",
    "sample_posterior",
    "selective_accuracy",
    "token_scores",
]


class _CallablePackage(ModuleType):
    def __call__(self, *arguments: Any, **options: Any) -> Any:
        from mergekit_bayes.evaluate.runner.run import evaluate

        return evaluate(*arguments, **options)


sys.modules[__name__].__class__ = _CallablePackage
