"""Polynomials of the weights: exact on polynomials, and honest about their error."""

from __future__ import annotations

import numpy as np
import pytest

from mergekit_bayes.preview.design import lattice, random_mixes, scaled
from mergekit_bayes.preview.polynomial import fit_polynomial, free_weights, polynomial_terms


def quadratic(mixes: list[tuple[float, ...]]) -> np.ndarray:
    points = np.array(mixes)
    first = 1 + points @ np.array([0.5, -1.0, 2.0]) + points[:, 0] * points[:, 1]
    return np.stack([first, np.square(points[:, 2]) - 0.3], axis=1)


def test_a_quadratic_is_recovered_from_as_many_mixes_as_it_has_terms() -> None:
    mixes = list(random_mixes(3, 6, seed=0))
    assert free_weights(mixes) == 2
    assert polynomial_terms(2, 2) == 6
    fitted = fit_polynomial(mixes, quadratic(mixes), degree=2)
    others = list(lattice(3, 4))
    assert np.allclose(fitted(others)[:, 0], quadratic(others)[:, 0], atol=1e-8)
    assert np.isnan(fitted.error).all()  # nothing is left to be left out


def test_off_the_simplex_all_weights_are_free() -> None:
    mixes = list(scaled(random_mixes(3, 20, seed=1), [1.0, 0.4]))
    assert free_weights(mixes) == 3
    fitted = fit_polynomial(mixes, quadratic(mixes), degree=2)
    assert np.allclose(fitted(mixes), quadratic(mixes), atol=1e-10)
    assert np.allclose(fitted.error, 0, atol=1e-9)


def test_errors_of_left_out_mixes_are_those_of_fits_without_them() -> None:
    mixes = list(lattice(3, 4))
    values = np.exp(2 * np.array(mixes)) @ np.array([[1.0], [0.5], [-1.0]])
    fitted = fit_polynomial(mixes, values, degree=2)
    for index, mix in enumerate(mixes):
        rest = [other for other in mixes if other != mix]
        alone = fit_polynomial(rest, np.delete(values, index, axis=0), degree=2)
        if np.allclose(alone.lowest, fitted.lowest) and np.allclose(alone.highest, fitted.highest):
            assert fitted.left_out[index, 0] == pytest.approx(values[index, 0] - alone([mix])[0, 0], abs=1e-9)
    assert fitted.error[0] == pytest.approx(np.sqrt(np.square(fitted.left_out).mean()))


def test_too_few_mixes_are_refused() -> None:
    with pytest.raises(ValueError, match="5 mixes for a polynomial of 6 terms"):
        fit_polynomial(list(random_mixes(3, 5, seed=0)), np.zeros((5, 2)), degree=2)
