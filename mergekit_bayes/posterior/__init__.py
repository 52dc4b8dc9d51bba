"""Posteriors of weight tensors, and the rule that merges them.

    family.py        Posterior: what every family can do
    isotropic.py     Isotropic: one precision for the whole tensor
    diagonal.py      Diagonal: one precision per entry
    elementwise.py   the algebra those two share
    rule.py          merge_posteriors: natural parameters add; check_inputs: what can be merged at all
    kronecker.py     Kronecker: for linear layers, a diagonal plus products of input and output curvature
    term.py          Term: one such product
    kronecker_rule.py        merge_kronecker: the rule for them
    conjugate_gradients.py   solving with a precision that is never formed
    eigenbasis.py            bases in which it is nearly diagonal
    preconditioner.py        what solving starts from there
    solve.py                 the three together
    closed_form.py           what needs its eigenvalues: volume, traces, samples
    mixture.py       Mixture: several posteriors of one task
    mixture_rule.py  merge_mixtures: the rule for them, by expectation maximisation
    mismatch.py      mismatch: what a merge will cost each source

A posterior holds a `mean` and a `precision`: the inverse variance at data scale, that is, of the loss summed
over the training units, with the prior included once. Values are checked when a posterior is built
(`Diagonal(mean, precision)`) and after every operation of the algebra; `unchecked` and `merge_posteriors`
leave that to the caller, because they run on blocks inside compiled loops. A new family is one more file.
Importing this package does not import torch.
"""

from __future__ import annotations

from mergekit_bayes.posterior.diagonal import Diagonal
from mergekit_bayes.posterior.family import Posterior
from mergekit_bayes.posterior.isotropic import Isotropic
from mergekit_bayes.posterior.kronecker import Kronecker
from mergekit_bayes.posterior.kronecker_rule import merge_kronecker
from mergekit_bayes.posterior.mismatch import mismatch
from mergekit_bayes.posterior.mixture import Mixture
from mergekit_bayes.posterior.mixture_rule import merge_mixtures
from mergekit_bayes.posterior.rule import check_inputs, merge_posteriors
from mergekit_bayes.posterior.term import Term

__all__ = [
    "Diagonal",
    "Isotropic",
    "Kronecker",
    "Mixture",
    "Posterior",
    "Term",
    "check_inputs",
    "merge_kronecker",
    "merge_mixtures",
    "merge_posteriors",
    "mismatch",
]
