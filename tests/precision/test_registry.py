"""The page of estimators: names, options, and that they are what they say."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest

from mergekit_bayes.errors import MethodError
from mergekit_bayes.precision.registry import ESTIMATORS, create, get_estimator
from mergekit_bayes.precision.signals import SIGNALS, SignalName
from mergekit_bayes.precision.targets import find_targets
from tests.precision.small_models import TwoLayers


def test_names_are_sorted_and_those_of_the_design() -> None:
    assert list(ESTIMATORS) == ["adam", "empirical_fisher", "fisher", "ggn", "gram", "kfac"]
    assert all(name == spec.name for name, spec in ESTIMATORS.items())
    assert set(SIGNALS) == set(get_args(SignalName))


def test_every_estimator_is_what_the_page_says() -> None:
    model = TwoLayers().eval()
    for spec in ESTIMATORS.values():
        assert (spec.family == "kronecker") == bool(spec.factors)
        if spec.source == "data":
            estimator = create(spec.name, model, find_targets(model, space="full", factors=spec.factors), seed=0)
            assert (estimator.name, estimator.family) == (spec.name, spec.family)
            of_labels = {"sampled_label": "model", "random_vector": "model", "data_label": "data", None: None}
            assert of_labels[estimator.signal] == spec.labels


def test_options_are_checked_and_filled_in() -> None:
    kfac = get_estimator("kfac")
    assert kfac.resolve_options({}) == {"eigenvalues": False, "max_dimension": 16384}
    assert kfac.resolve_options({"eigenvalues": True})["eigenvalues"] is True
    with pytest.raises(MethodError, match=r"unknown option `eigenvalue`.*Did you mean `eigenvalues`"):
        kfac.resolve_options({"eigenvalue": True})
    with pytest.raises(MethodError, match="`eigenvalues` is 1; expected bool"):
        kfac.resolve_options({"eigenvalues": 1})
    with pytest.raises(MethodError, match="`max_dimension` is 0; expected at least 1"):
        kfac.resolve_options({"max_dimension": 0})
    with pytest.raises(MethodError, match="it has none"):
        get_estimator("fisher").resolve_options({"damping": 1.0})


def test_names_that_do_not_exist() -> None:
    with pytest.raises(MethodError, match=r"unknown estimator `fischer`.*Did you mean `fisher`"):
        get_estimator("fischer")
    model = TwoLayers().eval()
    with pytest.raises(MethodError, match="reads the state of an optimizer"):
        create("adam", model, find_targets(model, space="full"), seed=0)


def test_the_page_is_read_without_heavy_imports() -> None:
    program = "import sys, mergekit_bayes.precision.registry\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
