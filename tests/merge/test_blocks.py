"""The arithmetic of one block: pieces give the bits of the whole, and every switch of the formula does its part."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergekit_bayes.merge import blocks
from mergekit_bayes.merge.blocks import Formula, Merged, Stored, combine, in_chunks
from mergekit_bayes.merge.registry import get_method, methods

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
IN_BLOCKS = tuple(method.name for method in methods() if method.scope == "element")
WITH_PRECISION = tuple(name for name in IN_BLOCKS if get_method(name).precision != "unused")


def formula(method: str, **changes: object) -> Formula:
    settings: dict[str, object] = {
        "method": get_method(method),
        "dtype": torch.float32,
        "mean_dtype": torch.float32,
        "precision_dtype": torch.float32,
        "with_mismatch": True,
        **changes,
    }
    return Formula(**settings)  # type: ignore[arg-type]


def stored(seed: int, count: int, *, dtype: torch.dtype = torch.float32, isotropic: bool = False) -> Stored:
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(count, generator=generator).to(dtype)
    precision = 1.0 + torch.randn(count, generator=generator).exp()
    return Stored(mean, torch.tensor(1.5) if isotropic else precision.to(dtype))


def same(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return left.dtype == right.dtype and torch.equal(left, right)


@pytest.mark.parametrize("method", IN_BLOCKS)
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 16, 29])
@pytest.mark.parametrize("isotropic", [False, True])
def test_pieces_have_the_bits_of_the_whole(
    method: str, count: int, isotropic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "CHUNK", 8)
    rule = formula(method, floor=2.0)
    base = Stored(stored(0, count).mean, torch.tensor(0.5))
    sources = [stored(seed, count, isotropic=isotropic) for seed in (1, 2)]
    weights = torch.tensor([0.75, -0.25])
    whole, pieces = combine(rule, base, sources, weights), in_chunks(rule)(base, sources, weights)
    assert same(pieces.mean, whole.mean)
    assert same(pieces.precision, whole.precision)
    assert pieces.precision is not None
    assert pieces.precision.is_contiguous()
    assert pieces.mismatch is not None
    assert whole.mismatch is not None
    torch.testing.assert_close(pieces.mismatch.float(), whole.mismatch, rtol=1e-5, atol=1e-5)
    assert (pieces.floored, pieces.lowest_precision) == (whole.floored, whole.lowest_precision)
    if count:
        assert whole.lowest_precision == whole.precision.amin() if whole.precision is not None else False


@pytest.mark.parametrize("method", IN_BLOCKS)
@pytest.mark.parametrize("kind", DTYPES)
def test_blocks_leave_in_the_dtype_they_are_written_in(method: str, kind: torch.dtype) -> None:
    sources = [stored(seed, 12, dtype=kind) for seed in (1, 2)]
    rule = formula(method, mean_dtype=kind, precision_dtype=torch.bfloat16)
    merged = combine(rule, Stored(stored(0, 12, dtype=kind).mean, torch.tensor(0.5)), sources, torch.ones(2))
    assert merged.mean.dtype == kind
    assert merged.precision is not None
    assert merged.precision.dtype == torch.bfloat16


def merged_with(rule: Formula, **changes: Tensor) -> Merged:
    sources = [stored(1, 12)._replace(**changes), stored(2, 12)]
    return combine(rule, Stored(stored(0, 12).mean, torch.tensor(0.5)), sources, torch.tensor([1.0, 0.5]))


@pytest.mark.parametrize("method", WITH_PRECISION)
def test_a_divisor_divides_and_a_share_is_exchanged_for_the_prior(method: str) -> None:
    plain, rule = stored(1, 12), formula(method)
    divided = merged_with(rule, divisor=torch.tensor(4.0))
    assert same(divided.mean, merged_with(rule, precision=plain.precision / 4).mean)
    exchanged = merged_with(rule, divisor=torch.tensor(2.0), prior_share=torch.tensor(0.25))
    assert same(exchanged.mean, merged_with(rule, precision=plain.precision / 2 - 0.25 + 0.5).mean)


@pytest.mark.parametrize("method", WITH_PRECISION)
def test_the_written_precision_is_scaled_and_nothing_else_is(method: str) -> None:
    plain, scaled = merged_with(formula(method)), merged_with(formula(method, precision_scale=10.0))
    assert plain.precision is not None
    assert same(scaled.precision, plain.precision * 10)
    assert same(scaled.mean, plain.mean)
    assert same(scaled.mismatch, plain.mismatch)
    assert same(scaled.lowest_precision, plain.lowest_precision)


def test_what_is_not_asked_for_is_not_computed() -> None:
    merged = merged_with(formula("gradient_matching", precision_dtype=None, with_mismatch=False))
    assert merged.precision is None
    assert merged.mismatch is None
    assert merged.floored is None


def test_arithmetic_is_that_of_the_formula_not_of_the_files() -> None:
    """Sixteen-bit inputs are merged in 32 bits and rounded once, not at every step."""
    sources = [stored(seed, 1000, dtype=torch.bfloat16) for seed in (1, 2)]
    base = Stored(stored(0, 1000, dtype=torch.bfloat16).mean, torch.tensor(0.5))
    weights = torch.tensor([0.7, 0.4])
    rule = formula("task_arithmetic", mean_dtype=torch.bfloat16)
    merged = combine(rule, base, sources, weights).mean
    b, one, two = (each.mean.double() for each in (base, *sources))
    wanted = b + 0.7 * (one - b) + 0.4 * (two - b)
    assert float((merged.double() - wanted).abs().div(wanted.abs().clamp(min=0.05)).max()) < 2**-8 * 1.01
