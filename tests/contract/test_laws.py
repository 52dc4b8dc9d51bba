"""Every law on every registered merge method, and every method with an oracle."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mergekit_bayes.errors import NonPositivePrecisionError
from mergekit_bayes.merge.registry import MergeMethod, method_names, methods
from mergekit_bayes.posterior import Diagonal, Isotropic
from tests.contract.laws import ORACLES, REMOVAL, SIMPLEX, Law, draw, laws_of, merge, the_oracle_agrees

METHODS = methods()
ELEMENTWISE = [each for each in METHODS if each.scope == "element"]


def _name(thing: object) -> str | None:
    return thing.name if isinstance(thing, MergeMethod) else getattr(thing, "__name__", None)


@pytest.mark.parametrize(
    ("method", "law"), [(each, law) for each in METHODS for law in (*laws_of(each), the_oracle_agrees)], ids=_name
)
def test_law(method: MergeMethod, law: Law) -> None:
    law(method)


@pytest.mark.parametrize("method", [each for each in METHODS if each.precision != "unused"], ids=_name)
def test_removing_more_than_was_learned_is_caught(method: MergeMethod) -> None:
    base, sources = draw(0)
    with pytest.raises(NonPositivePrecisionError):
        merge(method, base, sources, (0.5, 0.5, -3.0)).check()


def test_one_oracle_per_method() -> None:
    assert tuple(sorted(path.stem for path in Path(ORACLES).glob("*.py"))) == method_names()


def _flat(method: MergeMethod, floor: float | None, *tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    weights, prior, mean, *rest = tensors
    sources = [Diagonal.unchecked(*pair) for pair in zip(rest[::2], rest[1::2], strict=True)]
    merged = method.kernel(Isotropic.unchecked(mean, prior), sources, weights, floor=floor)
    return merged.mean, merged.precision_tensor()


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, on importing its compiler
@pytest.mark.parametrize("floor", [None, 0.7])
@pytest.mark.parametrize("method", ELEMENTWISE, ids=_name)
def test_compiled_gives_the_bits_of_eager(method: MergeMethod, floor: float | None) -> None:
    torch.compiler.reset()
    compiled = torch.compile(_flat, fullgraph=True, dynamic=True)
    for seed, (count, weights) in enumerate([(4097, SIMPLEX), (1000, REMOVAL), (65_536, REMOVAL), (33, SIMPLEX)]):
        base, sources = draw(seed, (count,), dtype=torch.float32)
        tensors = [base.mean, *(part for each in sources for part in (each.mean, each.precision_tensor()))]
        rounded = [each.bfloat16().float() for each in tensors]
        arguments = (torch.tensor(weights, dtype=torch.float64), base.precision_tensor(), *rounded)
        for seen, wanted in zip(compiled(method, floor, *arguments), _flat(method, floor, *arguments), strict=True):
            assert torch.equal(seen, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS, ids=_name)
def test_cuda_agrees_with_the_processor(method: MergeMethod) -> None:
    base, sources = draw(0, (4097,), dtype=torch.float32)
    wanted = merge(method, base, sources, REMOVAL)
    cuda = torch.device("cuda")
    moved = [Diagonal(each.mean.to(cuda), each.precision_tensor().to(cuda)) for each in sources]
    seen = merge(method, Isotropic(base.mean.to(cuda), base.precision_tensor().to(cuda)), moved, REMOVAL)
    # where a removal leaves little precision, rounding counts for more
    torch.testing.assert_close(seen.mean.cpu(), wanted.mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(seen.precision_tensor().cpu(), wanted.precision_tensor(), rtol=1e-4, atol=1e-6)
