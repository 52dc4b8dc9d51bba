"""What methods do to the moves of their sources."""

from __future__ import annotations

import pytest

from mergekit_bayes.merge.registry import get_method
from mergekit_bayes.preview.form import form_of


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("linear", "sum"),
        ("task_arithmetic", "sum"),
        ("posterior", "rule"),
        ("gradient_matching", "rule"),
        ("hessian_weighted", "rule"),
        ("ties", "other"),
    ],
)
def test_the_form_of_a_method(name: str, form: str) -> None:
    method = get_method(name)
    assert form_of(method, method.kernel_options({})) == form
