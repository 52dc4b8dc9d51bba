"""What every merge method promises, whatever its formula.

Each law is a function of one method that asserts something; `test_laws.py` runs every law on every registered
method, and the example in CONTRIBUTING.md is held to them too.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mergekit_bayes.errors import MethodError, NumericalError, ShapeMismatchError
from mergekit_bayes.merge.registry import Merge, MergeMethod
from mergekit_bayes.posterior import Diagonal, Isotropic, Posterior

Law = Callable[[MergeMethod], None]

ORACLES = Path(__file__).parents[1] / "oracles"
SIMPLEX = (0.5, 0.3, 0.2)
BEYOND_SIMPLEX = (0.9, 0.7, 0.8)
REMOVAL = (1.0, 0.8, -0.2)


def draw(
    seed: int, shape: Sequence[int] = (257,), *, count: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Posterior, list[Posterior]]:
    """A scalar prior, and task posteriors at least as precise as it, as fine-tuning produces them."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype)

    base = Isotropic(normal(), 0.5)
    return base, [Diagonal(base.mean + 0.3 * normal(), 0.5 + normal().exp()) for _ in range(count)]


def tensor(weights: Sequence[float], like: Posterior) -> Tensor:
    return torch.tensor(weights, dtype=like.mean.dtype, device=like.mean.device)


def merge(
    method: MergeMethod,
    base: Posterior,
    sources: Sequence[Posterior],
    weights: Sequence[float],
    floor: float | None = None,
) -> Posterior:
    return Merge.of(method.kernel(base, sources, tensor(weights, base), floor=floor)).posterior


def assert_same(seen: Posterior, wanted: Posterior, *, ulps: float = 0) -> None:
    """Equal means and precisions; with `ulps`, up to that many roundings at the size of the largest entry."""
    for left, right in ((seen.mean, wanted.mean), (seen.precision_tensor(), wanted.precision_tensor())):
        right = right.expand(left.shape)  # noqa: PLW2901
        room = ulps * torch.finfo(left.dtype).eps * max(1.0, float(right.abs().max()))
        torch.testing.assert_close(left, right, rtol=0, atol=room)


def one_source_at_weight_one_is_returned(method: MergeMethod) -> None:
    for dtype in (torch.float32, torch.float64):
        base, sources = draw(1, count=1, dtype=dtype)
        merged = merge(method, base, sources, (1.0,))
        torch.testing.assert_close(merged.mean, sources[0].mean, rtol=0, atol=8 * torch.finfo(dtype).eps)
        if method.precision != "unused":
            assert torch.equal(merged.precision_tensor(), sources[0].precision_tensor())


def equal_sources_on_the_simplex_are_returned(method: MergeMethod) -> None:
    base, sources = draw(2, count=1)
    merged = merge(method, base, sources * 3, SIMPLEX)
    wanted = sources[0] if method.precision != "unused" else base.with_mean(sources[0].mean)
    assert_same(merged, wanted, ulps=8)


def order_of_sources_does_not_matter(method: MergeMethod) -> None:
    base, sources = draw(3)
    for weights, floor in ((SIMPLEX, None), (BEYOND_SIMPLEX, None), (REMOVAL, 2.0)):
        wanted = merge(method, base, sources, weights, floor)
        for order in itertools.permutations(range(3)):
            merged = merge(method, base, [sources[i] for i in order], [weights[i] for i in order], floor)
            assert_same(merged, wanted, ulps=32)


def the_same_call_gives_the_same_bits(method: MergeMethod) -> None:
    for dtype in (torch.float32, torch.float64):
        base, sources = draw(4, dtype=dtype)
        first, second = (merge(method, base, sources, BEYOND_SIMPLEX) for _ in range(2))
        assert_same(first, second)


def inputs_are_not_changed(method: MergeMethod) -> None:
    base, sources = draw(5)
    tensors = [part for each in (base, *sources) for part in (each.mean, each.precision_tensor())]
    weights = tensor(BEYOND_SIMPLEX, base)
    tensors.append(weights)
    # the version counter also sees a change that is undone
    before = [(each.clone(), each._version) for each in tensors]
    method.kernel(base, sources, weights, floor=0.1)
    for each, (value, version) in zip(tensors, before, strict=True):
        assert torch.equal(each, value)
        assert each._version == version


def shape_dtype_and_device_are_kept(method: MergeMethod) -> None:
    for shape, dtype in itertools.product(((), (0,), (7,), (3, 4), (2, 1, 5)), (torch.float32, torch.float64)):
        base, sources = draw(6, shape, dtype=dtype)
        merged = merge(method, base, sources, SIMPLEX)
        precision = merged.precision_tensor()
        assert merged.mean.shape == base.mean.shape
        assert precision.shape in {base.mean.shape, torch.Size([])}
        assert merged.mean.dtype == precision.dtype == dtype


def nothing_is_read_back_from_the_device(method: MergeMethod) -> None:
    """Tensors without data: a kernel that branches on values, or moves them to the host, fails here."""
    meta = torch.device("meta")
    base = Isotropic.unchecked(torch.empty(5, 3, device=meta), torch.empty((), device=meta))
    sources = [Diagonal.unchecked(torch.empty(5, 3, device=meta), torch.empty(5, 3, device=meta))] * 2
    merged = merge(method, base, sources, (0.5, 0.5), floor=0.1)
    assert merged.mean.device == merged.precision_tensor().device == meta


def a_block_of_the_merge_is_the_merge_of_the_block(method: MergeMethod) -> None:
    for dtype in (torch.float32, torch.float64):
        base, sources = draw(7, (1000,), dtype=dtype)
        whole = merge(method, base, sources, REMOVAL, floor=0.7)
        for start, stop in ((0, 1), (0, 16), (3, 10), (17, 530), (992, 1000)):
            piece = slice(start, stop)
            part = merge(
                method,
                Isotropic(base.mean[piece], base.precision_tensor()),
                [Diagonal(each.mean[piece], each.precision_tensor()[piece]) for each in sources],
                REMOVAL,
                floor=0.7,
            )
            assert torch.equal(part.mean, whole.mean[piece])
            seen, wanted = part.precision_tensor(), whole.precision_tensor()
            assert torch.equal(seen, wanted[piece] if wanted.dim() else wanted)


def nothing_is_broadcast(method: MergeMethod) -> None:
    base, sources = draw(15, (4, 5))
    row = Diagonal(sources[0].mean[0], sources[0].precision_tensor()[0])
    with pytest.raises(ShapeMismatchError):
        merge(method, base, [sources[0], row], (0.5, 0.5))
    for weights in ((), (1.0,), (1.0, 1.0, 1.0, 1.0)):
        with pytest.raises(MethodError):
            merge(method, base, sources, weights)
    with pytest.raises(MethodError):
        merge(method, base, [], ())


def a_source_at_weight_zero_is_ignored(method: MergeMethod) -> None:
    base, sources = draw(8)
    assert_same(
        merge(method, base, sources, (0.6, 0.0, 0.4)),
        merge(method, base, [sources[0], sources[2]], (0.6, 0.4)),
        ulps=16,
    )


def on_the_simplex_the_mean_lies_between_its_sources(method: MergeMethod) -> None:
    """Also for precisions at the edges of float32."""
    for lowest, highest in ((-0.1, 0.1), (-30.0, 30.0)):
        base, sources = draw(9, (4096,), dtype=torch.float32)
        generator = torch.Generator().manual_seed(10)
        exponents = [torch.empty(4096).uniform_(lowest, highest, generator=generator) for _ in sources]
        sources = [Diagonal(each.mean, 10**exponent) for each, exponent in zip(sources, exponents, strict=True)]
        base = Isotropic(base.mean, 10**lowest)
        merged = merge(method, base, sources, (0.5, 0.25, 0.25)).check()
        means = torch.stack([each.mean for each in sources])
        assert (merged.mean >= means.amin(dim=0) - 1e-5).all()
        assert (merged.mean <= means.amax(dim=0) + 1e-5).all()


def impossible_precisions_do_not_pass_the_check(method: MergeMethod) -> None:
    """Removing more than was learned leaves the precision alone or is caught; a floor always mends it."""
    base, sources = draw(11)
    weights = (0.5, 0.5, -3.0)
    with contextlib.suppress(NumericalError):
        precision = merge(method, base, sources, weights).check().precision_tensor()
        assert (precision > 0).all()
        assert precision.isfinite().all()
    merge(method, base, sources, weights, floor=0.25).check()


def scaling_all_precisions_leaves_the_mean(method: MergeMethod) -> None:
    base, sources = draw(12)
    wanted = merge(method, base, sources, BEYOND_SIMPLEX).mean
    for factor, room in ((2.0**20, 0.0), (2.0**-20, 0.0), (3.7, 1e-14)):
        scaled_base = Isotropic(base.mean, base.precision_tensor() * factor)
        scaled = [Diagonal(each.mean, each.precision_tensor() * factor) for each in sources]
        seen = merge(method, scaled_base, scaled, BEYOND_SIMPLEX).mean
        torch.testing.assert_close(seen, wanted, rtol=0, atol=room)


def a_constant_diagonal_is_isotropic(method: MergeMethod) -> None:
    base, sources = draw(13)
    numbers = (0.5, 1.75, 3.0)
    isotropic = [Isotropic(each.mean, number) for each, number in zip(sources, numbers, strict=True)]
    diagonal = [Diagonal(each.mean, each.precision.expand_as(each.mean)) for each in isotropic]
    for weights in (SIMPLEX, BEYOND_SIMPLEX, REMOVAL):
        wanted = merge(method, base, isotropic, weights)
        assert torch.equal(merge(method, base, diagonal, weights).mean, wanted.mean)
        assert torch.equal(merge(method, base, [diagonal[0], *isotropic[1:]], weights).mean, wanted.mean)
        tensor_base = Diagonal(base.mean, base.precision_tensor().expand_as(base.mean))
        assert torch.equal(merge(method, tensor_base, isotropic, weights).mean, wanted.mean)


def undeclared_inputs_are_not_looked_at(method: MergeMethod) -> None:
    """`base`, `precision` and `prior` in the decorator are the truth: what is "unused" may hold anything."""
    base, sources = draw(14)
    wanted = merge(method, base, sources, BEYOND_SIMPLEX)
    other_prior = Isotropic(base.mean, 7.0)
    if method.base == "unused":
        nowhere = base.with_mean(torch.full_like(base.mean, torch.nan))
        assert_same(merge(method, nowhere, sources, BEYOND_SIMPLEX), wanted)
    if method.precision == "unused":
        others = [Isotropic.unchecked(each.mean, each.mean.new_tensor(torch.nan)) for each in sources]
        assert_same(merge(method, base, others, BEYOND_SIMPLEX), wanted)
    if method.prior == "unused":
        assert torch.equal(merge(method, other_prior, sources, BEYOND_SIMPLEX).mean, wanted.mean)
    else:
        assert not torch.allclose(merge(method, other_prior, sources, BEYOND_SIMPLEX).mean, wanted.mean)


def vote(seed: int, shape: Sequence[int] = (9, 6)) -> tuple[Posterior, list[Tensor]]:
    """A base, and three task vectors of matrices."""
    base, sources = draw(seed, shape)
    return base, [each.mean - base.mean for each in sources]


def merged_task_vector(
    method: MergeMethod, base: Posterior, task_vectors: Sequence[Tensor], weights: Sequence[float]
) -> Tensor:
    sources = [base.with_mean(base.mean + each) for each in task_vectors]
    return merge(method, base, sources, weights).mean - base.mean


def assert_near(seen: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(seen, wanted, rtol=0, atol=1e-11)


def whole_tensors_may_come_in_any_order(method: MergeMethod) -> None:
    base, tasks = vote(20)
    for weights in (SIMPLEX, BEYOND_SIMPLEX, REMOVAL):
        wanted = merged_task_vector(method, base, tasks, weights)
        for order in itertools.permutations(range(3)):
            assert_near(
                merged_task_vector(method, base, [tasks[i] for i in order], [weights[i] for i in order]), wanted
            )


def sources_that_say_nothing_are_not_heard(method: MergeMethod) -> None:
    """A weight of zero takes a source out; sources equal to the base return it to the last bit."""
    for shape in ((9, 6), (9,)):
        base, tasks = vote(21, shape)
        wanted = merged_task_vector(method, base, [tasks[0], tasks[2]], (0.6, 0.4))
        assert_near(merged_task_vector(method, base, tasks, (0.6, 0.0, 0.4)), wanted)
        assert torch.equal(merge(method, base, [base] * 3, BEYOND_SIMPLEX).mean, base.mean)


def the_size_of_task_vectors_carries_over(method: MergeMethod) -> None:
    base, tasks = vote(22)
    wanted = merged_task_vector(method, base, tasks, BEYOND_SIMPLEX)
    for size in (1e-3, -1.0, 64.0):
        seen = merged_task_vector(method, base, [size * each for each in tasks], BEYOND_SIMPLEX)
        assert_near(seen / size, wanted)


def names_and_signs_of_neurons_carry_over(method: MergeMethod) -> None:
    """Rows and columns in another order, and some of them negated, in all sources alike."""
    base, tasks = vote(23)
    generator = torch.Generator().manual_seed(24)
    left, right = (_signed_permutation(size, generator) for size in base.mean.shape)
    wanted = left @ merged_task_vector(method, base, tasks, BEYOND_SIMPLEX) @ right
    assert_near(merged_task_vector(method, base, [left @ each @ right for each in tasks], BEYOND_SIMPLEX), wanted)


def _signed_permutation(size: int, generator: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return torch.diag(signs)[torch.randperm(size, generator=generator)]


def bases_of_both_sides_carry_over(method: MergeMethod) -> None:
    """Rotating all task vectors rotates the merge, from the left and, but for votes of entries, from the right."""
    base, tasks = vote(25)
    generator = torch.Generator().manual_seed(26)
    left, right = (
        torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q for size in base.mean.shape
    )
    if method.name in VOTES_IN_COLUMNS:
        right = torch.eye(len(right), dtype=torch.float64)
    wanted = left @ merged_task_vector(method, base, tasks, BEYOND_SIMPLEX) @ right
    assert_near(merged_task_vector(method, base, [left @ each @ right for each in tasks], BEYOND_SIMPLEX), wanted)


def ranks_do_not_grow(method: MergeMethod) -> None:
    """Task vectors of low rank, as adapters have: the merge stays in the spaces that they span.

    The singular vectors that a library gives for zero are anywhere else.
    """
    base, _ = vote(27, (12, 10))
    generator = torch.Generator().manual_seed(28)
    columns = [torch.randn(12, 2, generator=generator, dtype=torch.float64) for _ in range(3)]
    tasks = [each @ torch.randn(2, 10, generator=generator, dtype=torch.float64) for each in columns]
    merged = merged_task_vector(method, base, tasks, (1.0, 1.0, 1.0))
    space = torch.linalg.qr(torch.cat(columns, dim=1)).Q
    assert_near(space @ (space.T @ merged), merged)


def the_oracle_agrees(method: MergeMethod) -> None:
    oracle = importlib.import_module(f"tests.oracles.{method.name}").oracle
    agrees_with(method, oracle)


def agrees_with(method: MergeMethod, oracle: Callable[..., tuple[np.ndarray, np.ndarray]]) -> None:
    """Entry by entry where the method works so, else matrices; `room` is for errors of rounding only.

    Singular vectors differ by more between two libraries of linear algebra.
    """
    shape = (33,) if method.scope == "element" else (7, 5)
    cases = itertools.product((1, 2, 5), (torch.float64, torch.float32), (None, 1.5), (False, True))
    for seed, (count, dtype, floor, tensor_prior) in enumerate(cases):
        base, sources = draw(100 + seed, shape, count=count, dtype=dtype)
        if tensor_prior:
            base = Diagonal(base.mean, base.precision_tensor() * (base.mean.square() + 0.1) / 10)
        weights = [0.9, 0.7, -0.15, 0.6, 0.8][:count]
        merged = merge(method, base, sources, weights, floor)
        mean, precision = oracle(
            _numpy(base.mean),
            _numpy(base.precision_tensor().expand_as(base.mean)),
            [_numpy(each.mean) for each in sources],
            [_numpy(each.precision_tensor()) for each in sources],
            # the kernel sees weights rounded to its dtype
            tensor(weights, base).double().tolist(),
            floor=floor,
        )
        room = (200 if method.scope == "element" else 10_000) * torch.finfo(dtype).eps
        seen = _numpy(merged.precision_tensor().expand_as(merged.mean))
        np.testing.assert_allclose(_numpy(merged.mean), mean, rtol=room, atol=room)
        np.testing.assert_allclose(seen, precision, rtol=room, atol=room)


def _numpy(values: Tensor) -> np.ndarray:
    return values.double().numpy()


def the_documentation_says_what_it_computes(method: MergeMethod) -> None:
    text = method.kernel.__doc__ or ""
    assert re.search(r"^ +\w+ = ", text, flags=re.MULTILINE), "an equation on its own line"
    assert re.fullmatch(r"arXiv \d{4}\.\d{5}", method.paper)
    assert " ".join(method.paper.split()) in " ".join(text.split()), "the docstring cites the paper"
    assert "Args:" in text
    assert "Returns:" in text
    assert method.summary.endswith(".")
    assert len(method.summary) < 100
    assert all(parameter.help for parameter in method.parameters)


LAWS: tuple[Law, ...] = (
    order_of_sources_does_not_matter,
    the_same_call_gives_the_same_bits,
    inputs_are_not_changed,
    shape_dtype_and_device_are_kept,
    nothing_is_broadcast,
    impossible_precisions_do_not_pass_the_check,
    undeclared_inputs_are_not_looked_at,
    the_documentation_says_what_it_computes,
)
"""What every method promises, whatever it sees and wherever it comes from."""

BAYESIAN_LAWS: tuple[Law, ...] = (
    one_source_at_weight_one_is_returned,
    equal_sources_on_the_simplex_are_returned,
    a_source_at_weight_zero_is_ignored,
    scaling_all_precisions_leaves_the_mean,
    a_constant_diagonal_is_isotropic,
)
"""What follows from the rule; methods that cut, vote or reshape a spectrum promise less."""

ELEMENT_LAWS: tuple[Law, ...] = (
    nothing_is_read_back_from_the_device,
    a_block_of_the_merge_is_the_merge_of_the_block,
    on_the_simplex_the_mean_lies_between_its_sources,
)
"""What methods promise that work entry by entry."""


HEURISTIC_LAWS: tuple[Law, ...] = (
    whole_tensors_may_come_in_any_order,
    sources_that_say_nothing_are_not_heard,
    the_size_of_task_vectors_carries_over,
    names_and_signs_of_neurons_carry_over,
)
"""What methods promise that look at task vectors alone and in one piece."""

SPECTRAL_LAWS: tuple[Law, ...] = (bases_of_both_sides_carry_over, ranks_do_not_grow)
"""What methods promise that work on singular values."""


def laws_of(method: MergeMethod) -> tuple[Law, ...]:
    """All laws that need nothing but the method; `the_oracle_agrees` also needs its file in `tests/oracles`."""
    element = ELEMENT_LAWS if method.scope == "element" else ()
    special = HEURISTIC_LAWS if method.name in HEURISTICS else BAYESIAN_LAWS
    spectral = SPECTRAL_LAWS if method.name in SPECTRAL else ()
    return (*LAWS, *special, *spectral, *element)


HEURISTICS = frozenset({"iso_c", "iso_cts", "knots", "ties", "tsv_m"})
"""Methods that are no case of the rule: a single source does not come back as it was."""

SPECTRAL = HEURISTICS - {"ties"}
"""Those among them that work on singular values."""

VOTES_IN_COLUMNS = frozenset({"knots"})
"""Those whose columns keep their meaning: entries vote for themselves there."""
