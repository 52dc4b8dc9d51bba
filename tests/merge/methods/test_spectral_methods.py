"""TSV-M, Iso-C, Iso-CTS and KnOTS where the answer is known in closed form, at low rank, and off the defaults."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mergekit_bayes.merge.methods.iso_cts import task_share
from mergekit_bayes.merge.registry import Merge, get_method
from mergekit_bayes.posterior import Isotropic
from tests.contract.laws import draw
from tests.oracles import iso_cts as iso_cts_oracle
from tests.oracles import knots as knots_oracle

METHODS = ("iso_c", "iso_cts", "knots", "tsv_m")


def _run(name: str, tasks: list[Tensor], weights: list[float] | None = None, **options: object) -> Merge:
    base = Isotropic(torch.zeros_like(tasks[0]), 1.0)
    alpha = torch.tensor(weights or [1.0] * len(tasks), dtype=torch.float64)
    merge: Merge = get_method(name).kernel(base, [base.with_mean(task) for task in tasks], alpha, **options)
    return merge


def _orthogonal(seed: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def _apart(sizes: list[list[float]]) -> list[Tensor]:
    """Tasks in orthogonal subspaces, with these singular values."""
    left, right = _orthogonal(1, 8), _orthogonal(2, 8)
    tasks, start = [], 0
    for values in sizes:
        part = slice(start, start + len(values))
        tasks.append(left[:, part] @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right[:, part].T)
        start += len(values)
    return tasks


def test_tasks_that_do_not_meet_are_added_by_tsv_m() -> None:
    tasks = _apart([[3.0, 1.0], [2.0, 0.5]])
    torch.testing.assert_close(_run("tsv_m", tasks).posterior.mean, tasks[0] + tasks[1])


@pytest.mark.parametrize("name", ["iso_c", "iso_cts"])
def test_tasks_that_do_not_meet_become_equally_loud(name: str) -> None:
    tasks = _apart([[3.0, 1.0], [2.0, 0.5], [1.0]])
    seen = torch.linalg.svdvals(_run(name, tasks).posterior.mean)
    torch.testing.assert_close(seen, torch.tensor([1.5] * 5 + [0.0] * 3, dtype=torch.float64))


def test_knots_keeps_what_nobody_disputes() -> None:
    tasks = _apart([[3.0, 1.0], [2.0, 0.5]])
    torch.testing.assert_close(_run("knots", tasks, density=1.0).posterior.mean, tasks[0] + tasks[1])


@pytest.mark.parametrize("name", METHODS)
def test_a_task_said_twice_is_no_reason_for_new_directions(name: str) -> None:
    (task,) = _apart([[3.0, 2.0, 1.0]])
    options = {"density": 1.0} if name == "knots" else {}
    merged = _run(name, [task, task], **options).posterior.mean
    left, right = _orthogonal(1, 8)[:, 3:], _orthogonal(2, 8)[:, 3:]
    torch.testing.assert_close(left.T @ merged, torch.zeros(5, 8, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(merged @ right, torch.zeros(8, 5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_iso_c_keeps_the_nuclear_norm_of_the_sum() -> None:
    tasks = [_apart([[3.0, 1.0]])[0], torch.roll(_apart([[2.0]])[0], (1, 1), dims=(0, 1))]
    merge = _run("iso_c", tasks)
    wanted = torch.linalg.svdvals(tasks[0] + tasks[1]).sum()
    torch.testing.assert_close(torch.linalg.svdvals(merge.posterior.mean).sum(), wanted)
    assert merge.measures == {"rank": 3.0, "singular_value": pytest.approx(float(wanted) / 3)}


@pytest.mark.parametrize("name", METHODS)
def test_more_directions_than_the_matrix_has_room_for(name: str) -> None:
    """Five tasks on a matrix of three columns, one of them silent."""
    generator = torch.Generator().manual_seed(3)
    tasks = [torch.randn(7, 3, generator=generator) for _ in range(4)]
    merge = _run(name, [*tasks, torch.zeros(7, 3)])
    assert merge.posterior.mean.isfinite().all()
    assert merge.posterior.mean.dtype == torch.float32
    torch.testing.assert_close(merge.posterior.mean, _run(name, tasks).posterior.mean)


@pytest.mark.parametrize("name", ["iso_c", "iso_cts", "knots"])
def test_tasks_that_cancel_leave_the_base(name: str) -> None:
    (task,) = _apart([[3.0, 2.0, 1.0]])
    merged = _run(name, [task, task], [1.0, -1.0]).posterior.mean
    assert torch.equal(merged, torch.zeros(8, 8, dtype=torch.float64))


@pytest.mark.parametrize("name", METHODS)
def test_the_scale_multiplies_the_merged_task_vector(name: str) -> None:
    for shape in ((6, 5), (6,)):
        base, sources = draw(4, shape)
        weights = torch.ones(3, dtype=torch.float64)
        one, other = (get_method(name).kernel(base, sources, weights, scale=scale) for scale in (1.0, 1.5))
        torch.testing.assert_close(other.posterior.mean - base.mean, 1.5 * (one.posterior.mean - base.mean))


@pytest.mark.parametrize("name", ["iso_c", "iso_cts", "tsv_m"])
def test_what_is_no_matrix_is_averaged(name: str) -> None:
    base, sources = draw(5, (4, 3, 2))
    merge = get_method(name).kernel(base, sources, torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64))
    tasks = [each.mean - base.mean for each in sources]
    torch.testing.assert_close(merge.posterior.mean, base.mean + (2 * tasks[0] + tasks[1] + tasks[2]) / 3)


@pytest.mark.parametrize("common_fraction", [0.0, 0.5, 1.0])
def test_iso_cts_at_other_fractions(common_fraction: float) -> None:
    base, sources = draw(6, (9, 12))
    weights = [1.0, 0.8, 0.6]
    merge = get_method("iso_cts").kernel(
        base, sources, torch.tensor(weights, dtype=torch.float64), common_fraction=common_fraction
    )
    wanted, _ = iso_cts_oracle.oracle(
        base.mean.numpy(),
        np.ones((9, 12)),
        [each.mean.numpy() for each in sources],
        [],
        weights,
        common_fraction=common_fraction,
    )
    np.testing.assert_allclose(merge.posterior.mean.numpy(), wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("rank", "tasks", "fraction", "share"), [(1024, 8, 0.8, 26), (10, 3, 0.8, 1), (4, 8, 0.0, 0), (9, 3, 1.0, 0)]
)
def test_the_directions_of_a_task(rank: int, tasks: int, fraction: float, share: int) -> None:
    assert task_share(rank, tasks, fraction) == share


@pytest.mark.parametrize("density", [(0.5, 0.1, 0.9), (1.0, 0.0, 0.3)])
def test_knots_with_densities_of_single_sources(density: tuple[float, ...]) -> None:
    base, sources = draw(7, (6, 9))
    weights = [1.0, 0.8, -0.6]
    merge = get_method("knots").kernel(base, sources, torch.tensor(weights, dtype=torch.float64), density=density)
    means = [each.mean.numpy() for each in sources]
    wanted, _ = knots_oracle.oracle(base.mean.numpy(), np.ones((6, 9)), means, [], weights, density=density)
    np.testing.assert_allclose(merge.posterior.mean.numpy(), wanted, rtol=0, atol=1e-11)
