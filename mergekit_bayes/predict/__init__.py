"""What a posterior predicts: samples of it, averaged probabilities, pruning by signal to noise, and scores.

Works on any model in memory together with precisions: a sidecar, its folder, or a mapping.

    attach.py        attach_posterior: which precision belongs to which parameter; with
                     names.py (weights by their names in files), precisions.py (from memory or disk) and
                     belongs.py (are these the weights that the precisions describe?)
    sampling.py      sample_posterior: the model holds a sample while a context lasts
    classes.py       predict_probabilities: of classes, averaged over samples
    tokens.py        predict_next_tokens: the same for language models
    choices.py       predict_choices: of the choices of a question, by a language model; all three with
                     batches.py (what goes in), draws.py (which weights) and average.py (of probabilities)
    harness.py       tasks of lm-eval-harness, on the weights that the model has
    temperature.py   choose_temperature: how wide to sample, by validation data
    prior.py         choose_prior, with_prior: how wide where the data say nothing
    search.py        the search of both
    pruning.py       prune_posterior: zero where the mean is small beside its uncertainty; smallest.py finds where
    scores.py        accuracy, nll, brier, ece, accuracy at coverage
    bootstrap.py     paired_interval: is one model better than another, or is it the choice of examples?
    rows.py          rows of files as batches of a model's arguments
"""

from __future__ import annotations

from mergekit_bayes.predict.attach import AttachedPosterior, attach_posterior
from mergekit_bayes.predict.bootstrap import Interval, paired_interval, paired_intervals
from mergekit_bayes.predict.choices import ChoicePrediction, predict_choices
from mergekit_bayes.predict.classes import ClassPrediction, predict_probabilities
from mergekit_bayes.predict.precisions import read_precisions
from mergekit_bayes.predict.prior import ChosenPrior, choose_prior, with_prior
from mergekit_bayes.predict.pruning import Pruning, prune_posterior
from mergekit_bayes.predict.sampling import sample_posterior
from mergekit_bayes.predict.scores import (
    BINS,
    Score,
    calibration_gaps,
    choice_scores,
    class_scores,
    selective_accuracy,
    token_scores,
)
from mergekit_bayes.predict.temperature import ChosenTemperature, choose_temperature
from mergekit_bayes.predict.tokens import TokenPrediction, VocabularyPrediction, predict_next_tokens

__all__ = [
    "BINS",
    "AttachedPosterior",
    "ChoicePrediction",
    "ChosenPrior",
    "ChosenTemperature",
    "ClassPrediction",
    "Interval",
    "Pruning",
    "Score",
    "TokenPrediction",
    "VocabularyPrediction",
    "attach_posterior",
    "calibration_gaps",
    "choice_scores",
    "choose_prior",
    "choose_temperature",
    "class_scores",
    "paired_interval",
    "paired_intervals",
    "predict_choices",
    "predict_next_tokens",
    "predict_probabilities",
    "prune_posterior",
    "read_precisions",
    "sample_posterior",
    "selective_accuracy",
    "token_scores",
    "with_prior",
]
