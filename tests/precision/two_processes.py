"""One of two processes that share rows. Started by the tests, which compare with all rows in one."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist

from mergekit_bayes.precision.estimator import Counts
from mergekit_bayes.precision.registry import create, get_estimator
from mergekit_bayes.precision.targets import find_targets
from tests.precision.small_models import TwoLayers, features, sequences

KINDS: tuple[tuple[str, dict[str, object]], ...] = (
    ("fisher", {}),
    ("ggn", {}),
    ("gram", {}),
    ("kfac", {}),
    ("kfac", {"eigenvalues": True}),
)


def share(rank: int, processes: int) -> dict[str, dict[str, torch.Tensor]]:
    """Results of all estimators from the rows of one process, added up over all of them."""
    model = TwoLayers().eval()
    batch = {name: value[rank::processes] for name, value in sequences(features(7, 4, 5), classes=3).items()}
    found = {}
    for name, options in KINDS:
        targets = find_targets(model, space="full", factors=get_estimator(name).factors)
        estimator = create(name, model, targets, seed=3, chunk_size=2, options=options)
        for index in range(estimator.passes):
            estimator.start_pass(index)
            counts = added_up(estimator.update(batch), processes)
            sums = {key: value.clone() for key, value in estimator.sums().items()}
            for value in sums.values() if processes > 1 else ():
                dist.all_reduce(value)
            estimator.load_sums(sums)
        assert counts == Counts(rows=7, units=21)
        found[f"{name} {options}"] = estimator.result(counts)
    return found


def added_up(counts: Counts, processes: int) -> Counts:
    if processes == 1:
        return counts
    total = torch.tensor([counts.rows, counts.units])
    dist.all_reduce(total)
    return Counts(*total.tolist())


if __name__ == "__main__":
    dist.init_process_group("gloo")
    shared = share(dist.get_rank(), dist.get_world_size())
    if dist.get_rank() == 0:
        torch.save(shared, sys.argv[1])
    dist.destroy_process_group()
