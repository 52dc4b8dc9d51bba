"""The mixes that a recipe asks for, in the order in which they are looked at."""

from __future__ import annotations

from mergekit_bayes.preview.design import (
    Mix,
    in_order_of_spread,
    lattice,
    lattice_size,
    partitions_within,
    random_mixes,
    scaled,
)
from mergekit_bayes.recipe.preview import PreviewRecipe

__all__ = ["design_size", "mixes_of"]

USUAL_PARTITIONS = 10
MOST_EVALUATED, MOST_PREDICTED = 300, 2000
"""Mixes of a lattice whose step the recipe leaves open, with and without evaluation."""

_SPREAD = 3000  # more mixes are not put in order, which takes the square of their number


def _partitions(recipe: PreviewRecipe) -> int:
    spec, sources = recipe.design, len(recipe.models)
    if spec.partitions is not None:
        return spec.partitions
    if spec.step is not None:
        return round(1 / spec.step)
    if "evaluated" not in recipe.fidelity:
        return partitions_within(sources, MOST_PREDICTED)
    return min(USUAL_PARTITIONS, partitions_within(sources, MOST_EVALUATED))


def mixes_of(recipe: PreviewRecipe) -> tuple[Mix, ...]:
    """Every mix of the design, each as far as possible from those before it."""
    spec, sources = recipe.design, len(recipe.models)
    if spec.kind == "simplex":
        found = lattice(sources, _partitions(recipe))
    elif spec.kind == "random":
        assert spec.points is not None  # the check of the recipe wants it
        found = random_mixes(sources, spec.points, seed=recipe.seed, concentration=spec.concentration)
    else:
        found = spec.weights
    mixes = scaled(found, spec.scales)
    return in_order_of_spread(mixes) if len(mixes) <= _SPREAD else mixes


def design_size(recipe: PreviewRecipe) -> int:
    """Number of mixes of one method, without making them."""
    spec = recipe.design
    if spec.kind == "simplex":
        return lattice_size(len(recipe.models), _partitions(recipe)) * len(spec.scales)
    return (spec.points or len(spec.weights)) * len(spec.scales)
