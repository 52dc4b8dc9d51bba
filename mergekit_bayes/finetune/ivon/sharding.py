"""Parameters that are spread over processes (DTensor, as `fully_shard` makes them): the part that lives here.

Everything is computed on local parts; state has the type, the mesh and the placement of its parameter. Every process
draws the noise of its own part of the stream, so that the weights they gather are the sample one process would see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mergekit_bayes.errors import FinetuneError
from mergekit_bayes.finetune.ivon.noise import KeyedNoise

__all__ = [
    "agree",
    "draw",
    "drop_gathered",
    "is_sharded",
    "local",
    "local_gradient",
    "refuse_foreign_sharding",
    "whole",
]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor; asked without importing them."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """Returns the part of a tensor that lives in this process, detached, sharing memory."""
    tensor = tensor.detach()
    return cast("Tensor", cast("Any", tensor).to_local()) if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Returns the whole of a tensor, detached; every process that holds a part has to take part."""
    tensor = tensor.detach()
    return cast("Tensor", cast("Any", tensor).full_tensor()) if is_sharded(tensor) else tensor


def local_gradient(parameter: Tensor, gradient: Tensor) -> Tensor:
    """Returns the part of a gradient that belongs to the local part of its parameter."""
    if is_sharded(parameter) and is_sharded(gradient):
        wanted = cast("Any", parameter).placements
        if cast("Any", gradient).placements != wanted:
            gradient = cast("Any", gradient).redistribute(placements=wanted)
    return local(gradient)


def draw(noise: KeyedNoise, key: int, places: Sequence[tuple[int, Tensor]]) -> dict[Tensor, Tensor]:
    """Returns normal numbers for the local part of every parameter.

    Args:
        noise: the source.
        key: of the stream.
        places: begin in the stream, and parameter; in ascending order.
    """
    drawn: dict[Tensor, Tensor] = {}
    ranges: dict[torch.device, list[tuple[Tensor, tuple[int, int]]]] = {}
    for at, parameter in places:
        part = local_range(parameter)
        if part is not None:
            ranges.setdefault(local(parameter).device, []).append((parameter, (at + part[0], at + part[1])))
            continue
        (numbers,) = noise.normal(local(parameter).device, key, [(at, at + parameter.numel())])
        drawn[parameter] = _cut_like(parameter, numbers.view(parameter.shape))
    for device, wanted in ranges.items():
        parts = noise.normal(device, key, [each for _, each in wanted])
        drawn |= {parameter: z.view(local(parameter).shape) for (parameter, _), z in zip(wanted, parts, strict=True)}
    return drawn


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


def _cut_like(parameter: Tensor, values: Tensor) -> Tensor:
    """The local part of a tensor that every process holds whole, cut like a parameter; nothing is sent."""
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = cast("Any", parameter).device_mesh, cast("Any", parameter).placements
    return distribute_tensor(values, mesh, placements, src_data_rank=None).to_local()


def agree(finite: bool, parameters: list[Tensor]) -> bool:
    """Returns whether all processes that hold a part of one of the parameters have said yes."""
    meshes = []
    for parameter in parameters:
        mesh = getattr(parameter, "device_mesh", None)
        if mesh is not None and mesh not in meshes:
            meshes.append(mesh)
    for mesh in meshes:
        flag = torch.tensor(float(not finite), device=mesh.device_type)
        for axis in range(mesh.ndim):
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=mesh.get_group(axis))
        finite = not bool(flag)
    return finite


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
