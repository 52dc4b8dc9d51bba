"""Whether two programs gave the same weights, under the names one of them uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def rounding_excess(
    ours: torch.Tensor, theirs: torch.Tensor, *, operands: Sequence[torch.Tensor], arithmetic: torch.dtype
) -> float:
    """Largest distance between two tensors as a share of what rounding explains: at most 1 for equal weights.

    Explained are one rounding of the result to the dtype it is stored in, and one rounding of the arithmetic
    per operand, at the size of the largest (where operands cancel, their rounding outlives them).

    Args:
        ours: floating tensor.
        theirs: tensor of the same shape and dtype.
        operands: everything that was added up, same shape.
        arithmetic: the coarser of the two dtypes that the programs computed in.
    """
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    result = torch.stack([ours.double().abs(), theirs.double().abs()]).amax(0)
    largest = torch.stack([operand.double().abs() for operand in operands]).amax(0)
    explained = _unit(result, ours.dtype) + len(operands) * _unit(largest, arithmetic)
    return float(((ours.double() - theirs.double()).abs() / explained).max())


def _unit(size: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance between neighbouring numbers of `dtype` at the magnitudes `size`."""
    information = torch.finfo(dtype)
    # frexp: size = mantissa * 2**exponent, mantissa in [0.5, 1): the leading bit is worth 2**(exponent - 1)
    exponent = size.clamp(min=information.smallest_normal).frexp().exponent - 1
    return torch.ldexp(torch.full_like(size, information.eps), exponent)


def unfused_experts(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mixtral weights under the hub's names, from the names inside transformers 5 that mergekit writes.

    Args:
        tensors: with `mlp.experts.gate_up_proj` (experts, 2 * intermediate, hidden) and `.down_proj`.
    """
    result = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.partition(".mlp.")
        if rest == "gate.weight":
            result[f"{layer}.block_sparse_moe.gate.weight"] = tensor
        elif rest == "experts.down_proj":
            for expert, down in enumerate(tensor):
                result[f"{layer}.block_sparse_moe.experts.{expert}.w2.weight"] = down
        elif rest == "experts.gate_up_proj":
            for expert, both in enumerate(tensor):
                for factor, half in zip(("w1", "w3"), both.chunk(2), strict=True):
                    result[f"{layer}.block_sparse_moe.experts.{expert}.{factor}.weight"] = half
        else:
            result[name] = tensor
    return result
