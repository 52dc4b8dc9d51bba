"""Averages of gradients and curvature estimates over processes that each drew their own sample."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mergekit_bayes.errors import FinetuneError
from mergekit_bayes.finetune.ivon.pack import Place
from mergekit_bayes.finetune.ivon.underway import Work

__all__ = ["average_over_processes", "process_rank"]

BUCKET = 1 << 23
"""Elements that travel together: 32 MiB, the only transient memory of the reduction."""

PROBE = 4096
"""Entries that are looked at to find out whether gradients were averaged before."""


def process_rank() -> int:
    """Returns the rank of this process, 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def average_over_processes(work: Work, trainable: Sequence[Place]) -> tuple[Work, bool]:
    """Averages gradients and products in place, in buckets, and tells every process the same about their health.

    Args:
        work: group, parameter, gradient and product of what got a gradient here; no packs.
        trainable: all that is, in the same order everywhere.

    Returns:
        The work, with what got a gradient in other processes only added (this one's share is zero), and whether
        all averages are finite.

    Raises:
        FinetuneError: the gradients are the same in all processes already; the products would not be.
    """
    health = _finite([tensor for _, _, *pair in work for tensor in pair])
    if not (dist.is_available() and dist.is_initialized()):
        return work, health
    here = {parameter: (gradient, product) for _, parameter, gradient, product in work}
    flags = [float(parameter in here) for *_, parameter in trainable] + [float(not health)]
    present = torch.tensor(flags, device=trainable[0][2].device if trainable else None)
    dist.all_reduce(present)
    *anywhere, unhealthy = present.tolist()
    if unhealthy:
        return work, False
    whole: Work = []
    for (group, _, parameter), seen in zip(trainable, anywhere, strict=True):
        if seen:
            pair = here.get(parameter) or (
                torch.zeros_like(parameter, requires_grad=False),
                torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False),
            )
            whole.append((group, parameter, *pair))
    own = [gradient.flatten()[:PROBE].float().clone() for _, _, gradient, _ in whole[:1]]
    tensors = [tensor for _, _, *pair in whole for tensor in pair]
    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1).float() for tensor in bucket])
        dist.all_reduce(flat)
        flat.div_(dist.get_world_size())
        parts = torch.split(flat, [tensor.numel() for tensor in bucket])
        for tensor, part in zip(bucket, parts, strict=True):
            tensor.copy_(part.view(tensor.shape))
    _check_that_they_differed(own, [gradient.flatten()[:PROBE].float() for _, _, gradient, _ in whole[:1]])
    return whole, _finite(tensors)


def _check_that_they_differed(own: list[Tensor], averages: list[Tensor]) -> None:
    """With noise of their own, two processes never have the same gradient; with gradients averaged before, always."""
    for mine, average in zip(own, averages, strict=True):
        size = average.abs().max() if average.numel() else average.sum()
        if dist.get_world_size() > 1 and bool(size > 0) and bool((mine - average).abs().max() <= 1e-6 * size):
            seen = "IVON: noise 'per_process', but the gradients are the same in all processes; expected those of each"
            raise FinetuneError(f"{seen} process: wrap the backward pass in `no_sync`, or use noise='shared'")


def _finite(tensors: Sequence[Tensor]) -> bool:
    return all(math.isfinite(float(torch.linalg.vector_norm(t, math.inf))) for t in tensors if t.numel())


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and (size + tensor.numel() > BUCKET or tensor.device != bucket[0].device):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
