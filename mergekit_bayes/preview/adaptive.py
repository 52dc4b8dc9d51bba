"""Where to evaluate next: the mixes whose scores, as far as they can be foreseen, make the front grow most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mergekit_bayes.preview.design import Mix
from mergekit_bayes.preview.fitted import fit_scores
from mergekit_bayes.preview.front import hypervolume

__all__ = ["next_mixes"]

Array: TypeAlias = NDArray[np.float64]


def next_mixes(design: Sequence[Mix], known: Mapping[Mix, Array], count: int) -> list[Mix]:
    """Chooses mixes to evaluate.

    Scores of the rest of the design are foreseen by the fit of `fitted.py`, each one error of that fit better than it
    says, so that what is uncertain is tried too. One by one, the mix that adds most to the hypervolume is taken, and
    what the fit says of it counts as known for the next (Ginsbourger et al. 2010). The volume is over the base, where a
    known mix is better than the base in every task, and else over the worst known score of every task.

    Args:
        design: mixes in order of spread, which breaks ties.
        known: gains of evaluated mixes, shape (tasks,), more is better; NaN where evaluation failed.
        count: how many are wanted.

    Returns:
        At most `count` mixes that are not known: the first of the design where there is nothing to foresee from.
    """
    left = [mix for mix in design if mix not in known]
    fit = fit_scores(left, known) if left else None
    if fit is None or len(left) <= count:
        return left[:count]
    error = np.nan_to_num(fit.error, nan=0.0)
    there = np.stack([gains for gains in known.values() if np.isfinite(gains).all()])
    base = np.zeros(there.shape[1])
    reference = base if hypervolume(there, base) > 0 else there.min(axis=0)
    chosen: list[int] = []
    for _ in range(count):
        volumes = [
            -1.0 if place in chosen else hypervolume(np.vstack([there, scores + error]), reference)
            for place, scores in enumerate(fit.scores)
        ]
        best = int(np.argmax(volumes))
        chosen.append(best)
        there = np.vstack([there, fit.scores[best]])
    return [left[place] for place in chosen]
