"""Parameters that are spread over processes (DTensor, as `fully_shard` makes them): the part that lives here.

Everything is computed on local parts; state has the type, the mesh and the placement of its parameter. Every process
draws the noise of its own part of the stream, so that the weights they gather are the sample one process would see.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from mergekit_bayes.errors import FinetuneError

__all__ = [
    "cut_like",
    "drop_gathered",
    "is_sharded",
    "local",
    "local_gradient",
    "local_range",
    "refuse_foreign_sharding",
    "refuse_foreign_wrapper",
    "shard_like",
    "whole",
]

_PLAIN = (Tensor, nn.Parameter)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; asked without importing them."""
    return type(tensor) not in _PLAIN and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that lives in this process: a plain tensor itself. Not for use in autograd."""
    return cast("Tensor", cast("Any", tensor.detach()).to_local()) if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Returns the whole of a tensor, detached; every process that holds a part has to take part."""
    tensor = tensor.detach()
    return cast("Tensor", cast("Any", tensor).full_tensor()) if is_sharded(tensor) else tensor


def local_gradient(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Returns the part of a gradient that belongs to the local part of its parameter.

    Raises:
        FinetuneError: a sparse one.
    """
    if is_sharded(parameter) and is_sharded(gradient):
        wanted = cast("Any", parameter).placements
        if cast("Any", gradient).placements != wanted:
            gradient = cast("Any", gradient).redistribute(placements=wanted)
    if gradient.layout != torch.strided:
        raise FinetuneError("IVON: sparse gradients have no curvature estimate; use a dense embedding")
    return local(gradient)


def local_range(parameter: Tensor) -> tuple[int, int] | None:
    """Returns begin and end of the local part in the flattened parameter; None if it is not one range."""
    if not is_sharded(parameter):
        return 0, parameter.numel()
    from torch.distributed.tensor import Replicate, Shard

    mesh, placements = cast("Any", parameter).device_mesh, cast("Any", parameter).placements
    cut = [(axis, each) for axis, each in enumerate(placements) if type(each) is not Replicate]
    if not cut:
        return 0, parameter.numel()
    (axis, placement), *others = cut
    if others or type(placement) is not Shard or placement.dim != 0:
        return None
    rows = -(-parameter.shape[0] // mesh.size(axis))  # as torch.chunk: all parts but the last have as many
    row = parameter.numel() // max(parameter.shape[0], 1)
    begin = min(rows * mesh.get_local_rank(axis), parameter.shape[0]) * row
    return begin, begin + local(parameter).numel()


def cut_like(parameter: Tensor, values: Tensor) -> Tensor:
    """Returns the local part of flat values that every process holds whole, cut like a parameter; nothing is sent."""
    return local(shard_like(parameter, values.view(parameter.shape)))


def shard_like(parameter: Tensor, values: Tensor) -> Tensor:
    """Returns values that every process holds whole in the shards of a parameter; themselves if that has none.

    Nothing is sent.

    Args:
        parameter: says where.
        values: of its shape.
    """
    if not is_sharded(parameter):
        return values
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = cast("Any", parameter).device_mesh, cast("Any", parameter).placements
    return distribute_tensor(values.detach(), mesh, placements, src_data_rank=None)


def drop_gathered(model: nn.Module) -> None:
    """Frees gathered copies of weights, so that the next forward pass gathers what the parts hold by then.

    `fully_shard` keeps the outermost copy from one forward pass to the next if no backward pass came between.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def refuse_foreign_sharding(parameter: Tensor) -> None:
    """Refuses parameters of engines that hold the trained weights in other tensors than these.

    Raises:
        FinetuneError: with the engine and what to use in its place.
    """
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        seen = "a parameter managed by DeepSpeed ZeRO, which trains copies that a sample would not reach"
    elif getattr(parameter, "_fsdp_flattened", False):
        seen = "a parameter flattened by FullyShardedDataParallel (FSDP 1)"
    else:
        return
    raise FinetuneError(f"IVON: {seen}; expected plain or `fully_shard` (FSDP 2) parameters, or use DDP")


def refuse_foreign_wrapper(optimizer: Any) -> None:
    """Refuses an optimizer of an engine around ours that trains copies of the weights.

    Raises:
        FinetuneError: with the engine and what to use in its place.
    """
    if "deepspeed" in f"{type(optimizer).__module__}.{type(optimizer).__name__}".lower():
        seen = "IVON: wrapped by DeepSpeed ZeRO, which trains copies of the weights that a sample would not reach"
        raise FinetuneError(f"{seen}; use DDP, or FSDP 2 (`fully_shard`)")
