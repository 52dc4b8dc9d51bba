"""Blocks as they are read for a merge: dense tensors, LoRA updates in either orientation, precisions, checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mergekit_bayes.checkpoint.adapter import open_adapter
from mergekit_bayes.checkpoint.index import open_checkpoint
from mergekit_bayes.checkpoint.reader import BlockReader
from mergekit_bayes.checkpoint.sidecar import open_sidecar
from mergekit_bayes.errors import NonFiniteError, NonPositivePrecisionError
from mergekit_bayes.merge.operands import OperandReader
from mergekit_bayes.merge.steps import LowRank, MergeStep, Operand
from tests.merge.adapter_problem import Make, Source, data_precision, write_source
from tests.merge.builders import factor_names, random_tensors, write_adapter, write_checkpoint, write_precisions

ROWS, COLUMNS = 6, 4
SHAPES = {"up": (ROWS, COLUMNS)}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return write_source(tmp_path / "adapter", 1, Make(rank=2, scaling=-1.5, modules=("up",)), shapes=SHAPES)


@pytest.fixture
def reader() -> Iterator[OperandReader]:
    files = BlockReader()
    yield OperandReader(files, torch.float64, "cpu")
    files.close()


def low_rank(source: Source, *, transposed: bool = False, precise: bool = True) -> LowRank:
    module = open_adapter(source.folder).modules["up"]
    known = open_sidecar(source.folder).tensors if precise else {}
    precisions = [known.get(name) for name in factor_names("up")]
    return LowRank(module.a, module.b, module.scaling, transposed, *precisions)


def step(operand: Operand, shape: tuple[int, ...], base: Operand | None = None) -> MergeStep:
    zero = Operand("base", None, precision=1.0) if base is None else base
    return MergeStep("up.weight", shape, "F32", None, zero, (operand,), (1.0,))


def weight(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Operand]:
    tensors = random_tensors(3, {"up.weight": shape}, dtype=dtype)
    folder = write_checkpoint(tmp_path / "dense", tensors)
    return tensors["up.weight"], Operand("dense", open_checkpoint(folder).tensors["up.weight"], precision=2.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_dense_block_arrives_as_it_is_stored(dtype: torch.dtype, reader: OperandReader, tmp_path: Path) -> None:
    tensor, operand = weight(tmp_path, (ROWS, COLUMNS), dtype)
    _, (block,) = reader.block(step(operand, (ROWS, COLUMNS)), 3, 11)
    assert torch.equal(block.mean, tensor.reshape(-1)[3:11])
    assert block.precision.dim() == 0
    assert float(block.precision) == 2.5
    assert block.divisor is None
    assert block.prior_share is None


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [(0, 4), (1, 2), (2, 4)])
def test_an_update_is_added_in_the_orientation_of_the_weight(
    transposed: bool, rows: tuple[int, int], source: Source, reader: OperandReader, tmp_path: Path
) -> None:
    shape = (COLUMNS, ROWS) if transposed else (ROWS, COLUMNS)
    dense, operand = weight(tmp_path, shape)
    mean, precision = source.posterior("up")
    if transposed:
        mean, precision = mean.T, precision.T
    factors = low_rank(source, transposed=transposed)
    adapted = Operand("adapter", operand.mean, factors, divisor=8.0, prior_share=0.25)
    _, (block,) = reader.block(step(adapted, shape), rows[0] * shape[1], rows[1] * shape[1])
    torch.testing.assert_close(block.mean, (dense.double() + mean)[rows[0] : rows[1]].reshape(-1), rtol=1e-12, atol=0)
    torch.testing.assert_close(block.precision, precision[rows[0] : rows[1]].reshape(-1), rtol=1e-12, atol=0)
    assert block.divisor is not None
    assert block.prior_share is not None
    assert (float(block.divisor), float(block.prior_share)) == (8.0, 0.25)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_prior_of_the_factors_is_taken_out_of_the_precision(
    transposed: bool, source: Source, reader: OperandReader
) -> None:
    """B's prior is meant at the scaling of training, 3, while the adapter has -1.5."""
    shape = (COLUMNS, ROWS) if transposed else (ROWS, COLUMNS)
    factors = replace(low_rank(source, transposed=transposed), prior=0.5, trained_scaling=3.0)
    _, (block,) = reader.block(step(Operand("adapter", None, factors), shape), 0, ROWS * COLUMNS)
    added = data_precision(source.factors["up"], source.precisions["up"], 0.5, trained=3.0, scaling=-1.5)
    wanted = added.T if transposed else added
    torch.testing.assert_close(block.precision, wanted.reshape(-1), rtol=1e-10, atol=0)
    assert block.prior_share is not None
    assert float(block.prior_share) == 0.0


def test_an_update_without_precisions_has_the_number_it_is_given(source: Source, reader: OperandReader) -> None:
    operand = Operand("adapter", None, low_rank(source, precise=False), precision=0.5)
    _, (block,) = reader.block(step(operand, (ROWS, COLUMNS)), 0, ROWS * COLUMNS)
    torch.testing.assert_close(block.mean, source.update("up").reshape(-1), rtol=1e-12, atol=0)
    assert float(block.precision) == 0.5


def test_the_base_may_carry_an_update_too(source: Source, reader: OperandReader) -> None:
    base = Operand("base", None, low_rank(source))
    found, _ = reader.block(step(Operand("dense", None, precision=1.0), (ROWS, COLUMNS), base), 4, 12)
    torch.testing.assert_close(found.mean, source.update("up").reshape(-1)[4:12], rtol=1e-12, atol=0)


def test_factors_have_the_scaling_in_b_and_its_square_in_the_variance(source: Source, reader: OperandReader) -> None:
    found = reader.factors(low_rank(source))
    a, b = (factor.double() for factor in source.factors["up"])
    precision_a, precision_b = (precision.double() for precision in source.precisions["up"])
    assert torch.equal(found.a, a)
    assert torch.equal(found.b, -1.5 * b)
    torch.testing.assert_close(found.variance_a, 1 / precision_a, rtol=1e-15, atol=0)
    torch.testing.assert_close(found.variance_b, 2.25 / precision_b, rtol=1e-15, atol=0)
    bare = reader.factors(low_rank(source, precise=False))
    assert bare.variance_a is None
    assert bare.variance_b is None


@pytest.mark.parametrize("factor", [0, 1])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_precision_that_is_no_precision_is_named(factor: int, value: float, source: Source, tmp_path: Path) -> None:
    raw = source.raw_precisions
    name = factor_names("up")[factor]
    raw[name][1, 1] = value
    path = _overwrite(source.folder, raw)
    expected = NonPositivePrecisionError if value in (0.0, -1.0) else NonFiniteError
    with pytest.raises(expected, match=rf"{name}: 1 of .*{path}"):
        OperandReader(BlockReader(), torch.float32, "cpu").factors(low_rank(source))


def _overwrite(folder: Path, precisions: dict[str, Tensor]) -> Path:
    """Put values into a sidecar that no writer of the library would write."""
    legal = {name: torch.ones_like(precision) for name, precision in precisions.items()}
    path = write_precisions(folder, legal)
    content = bytearray(path.read_bytes())
    for name, info in open_sidecar(folder).tensors.items():
        content[info.offset : info.offset + info.nbytes] = precisions[name].numpy().tobytes()
    path.write_bytes(bytes(content))
    return path


@pytest.mark.parametrize("factor", [0, 1])
def test_a_factor_that_is_no_number_is_named(factor: int, source: Source, reader: OperandReader) -> None:
    source.factors["up"][factor][0, 0] = float("nan")
    write_adapter(source.folder, dict(source.factors), alpha=-3.0)
    with pytest.raises(NonFiniteError, match=rf"{factor_names('up')[factor]}: 1 of .*adapter_model.safetensors"):
        reader.factors(low_rank(source, precise=False))
