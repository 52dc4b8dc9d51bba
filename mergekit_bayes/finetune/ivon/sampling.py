"""From means to a sample and back.

Noise is drawn for as many weights at a time as stay in the cache, used at once, and never held. What is held is one
tensor per parameter: the mean while the parameter is the sample, and the sample from then on until the step. Of small
parameters both are held while a context lasts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_bayes.finetune.ivon.fused import can_fuse, fused_perturb_
from mergekit_bayes.finetune.ivon.noise import KeyedNoise, aligned, room_for
from mergekit_bayes.finetune.ivon.pack import Pack, Unit, UnitPlace
from mergekit_bayes.finetune.ivon.sharding import cut_like, local, local_range
from mergekit_bayes.finetune.ivon.update import blocks, perturb_

__all__ = ["Draw", "Excursion", "Row", "exchange_", "perturb_all_", "restore_"]

DRAWN_ON_CPU, DRAWN_ELSEWHERE = 1 << 20, 1 << 26
"""Numbers drawn before they are used: 4 MiB on CPU; 256 MiB elsewhere, for few launches."""

PIECE_ON_CPU, PIECE_ELSEWHERE = 7 << 20, 1 << 28
"""Entries of a piece of memory. What is larger than 32 MiB, the allocator of glibc takes from the system each time and
gives back at once, and the system clears it; many small ones it gives back too."""


class Row(NamedTuple):
    """One parameter, or a part of one, that is to be perturbed.

    Attributes:
        mean: local part.
        hess: curvature of the same.
        scale: sqrt(temperature / ess); negative for the opposite sample.
        weight_decay: delta.
        at: its begin in the stream of noise.
        odd: the parameter, where its local part is not one range of it; `at` is then that of the whole parameter.
    """

    mean: Tensor
    hess: Tensor
    scale: float
    weight_decay: float
    at: int
    odd: Tensor | None = None

    @classmethod
    def of(cls, parameter: Tensor, hess: Tensor, at: int, *, scale: float, weight_decay: float) -> Row:
        """Returns the row of a parameter whose numbers begin at a place of the stream."""
        part = local_range(parameter)
        if part is None:
            return cls(local(parameter), local(hess), scale, weight_decay, at, parameter)
        return cls(local(parameter), local(hess), scale, weight_decay, at + part[0])


class Draw(NamedTuple):
    """How a sample is drawn.

    Attributes:
        noise: the source of normal numbers.
        key: of their stream.
        sign: -1 for the opposite sample.
        temperature: factor on the variance.
        fusing: use compiled functions where they pay.
    """

    noise: KeyedNoise
    key: int
    sign: int
    temperature: float
    fusing: bool


class Excursion:
    """The means of parameters while these hold a sample.

    Args:
        units: parameters and packs, in the order of the stream.
    """

    def __init__(self, units: Sequence[UnitPlace]) -> None:
        self._units = units
        self._means: dict[Unit, Tensor] = {}
        self._packed: dict[Unit, Tensor] = {}

    def begin(self, states: Mapping[Tensor, Mapping[str, Tensor]], samples: Mapping[Unit, Tensor], draw: Draw) -> None:
        """Fills the parameters with a sample.

        Args:
            states: curvature `hess` of every parameter.
            samples: what was drawn of it before.
            draw: the rest.
        """
        singles = [unit for *_, unit in self._units if not isinstance(unit, Pack)]
        self._means.update(zip(singles, clones([local(parameter) for parameter in singles]), strict=True))
        self._means.update({unit: unit.joined() for *_, unit in self._units if isinstance(unit, Pack)})
        held = {unit: samples[unit] for *_, unit in self._units if unit in samples}
        restore_(held)
        rows = []
        for group, at, unit in self._units:
            if unit in held:
                continue
            scale, weight_decay = draw.sign * math.sqrt(draw.temperature / group["ess"]), group["weight_decay"]
            if isinstance(unit, Pack):
                self._packed[unit] = self._means[unit].clone()
                rows.append(Row(self._packed[unit], unit.hess, scale, weight_decay, at))
            else:
                rows.append(Row.of(unit, states[unit]["hess"], at, scale=scale, weight_decay=weight_decay))
        perturb_all_(rows, draw.noise, draw.key, fusing=draw.fusing)
        restore_(self._packed)

    def end(self, samples: dict[Unit, Tensor] | None) -> None:
        """Restores the means, as far as they were taken.

        Args:
            samples: gets the sample of everything whose step needs it and that has none there; None if it is dropped.
        """
        fresh = {
            unit
            for group, _, unit in self._units
            if samples is not None and group["hess_approx"] == "price" and unit not in samples
        }
        exchanged = {
            unit: self._means.pop(unit) for *_, unit in self._units if unit in fresh and isinstance(unit, Tensor)
        }
        restore_(self._means)
        exchange_(exchanged)
        if samples is not None:
            drawn = (*exchanged.items(), *self._packed.items())
            samples.update({unit: sample for unit, sample in drawn if unit in fresh})


def perturb_all_(rows: Sequence[Row], noise: KeyedNoise, key: int, *, fusing: bool) -> None:
    """Turns means into a sample of theirs.

    Args:
        rows: in the order of the stream.
        noise: the source.
        key: of the stream.
        fusing: use compiled functions where they pay.
    """
    by_device: dict[torch.device, list[Row]] = {}
    for row in rows:
        if row.odd is None:
            by_device.setdefault(row.mean.device, []).append(row)
        else:
            numbers = noise.normal(row.mean.device, key, [(row.at, row.at + row.odd.numel())])
            _perturb_([row], [cut_like(row.odd, numbers[0])], fusing=fusing)
    for device, there in by_device.items():
        limit = DRAWN_ON_CPU if device.type == "cpu" else DRAWN_ELSEWHERE
        batches = [([(row.at, row.at + row.mean.numel()) for row in each], each) for each in _batches(there, limit)]
        most = max(room_for(ranges) for ranges, _ in batches)
        room = torch.empty(most, dtype=torch.float32, device=device)
        for ranges, batch in batches:
            _perturb_(batch, noise.normal(device, key, ranges, room=room), fusing=fusing)


def _batches(rows: Sequence[Row], limit: int) -> Iterator[list[Row]]:
    """Cuts the stream at multiples of the limit: a chunk of noise lies in one batch, and is drawn once."""
    batch: list[Row] = []
    for row in rows:
        for part in _parts(row, limit):
            if batch and part.at // limit != batch[0].at // limit:
                yield batch
                batch = []
            batch.append(part)
    if batch:
        yield batch


def _parts(row: Row, limit: int) -> Iterator[Row]:
    size = row.mean.numel()
    first = limit - row.at % limit
    if size <= first or not (row.mean.is_contiguous() and row.hess.is_contiguous()):
        yield row
        return
    mean, hess = row.mean.view(-1), row.hess.view(-1)
    for begin, end in pairwise([0, *range(first, size, limit), size]):
        yield row._replace(mean=mean[begin:end], hess=hess[begin:end], at=row.at + begin)


def _perturb_(rows: Sequence[Row], noise: Sequence[Tensor], *, fusing: bool) -> None:
    alike: dict[tuple[float, float], list[tuple[Tensor, Tensor, Tensor]]] = {}
    for row, numbers in zip(rows, noise, strict=True):
        z = numbers.view(row.mean.shape)
        if fusing and can_fuse(row.mean, row.hess, z):
            fused_perturb_(row.mean, row.hess, z, scale=row.scale, weight_decay=row.weight_decay)
        else:
            alike.setdefault((row.scale, row.weight_decay), []).append((row.mean, row.hess, z))
    for (scale, weight_decay), tensors in alike.items():
        for block in blocks(list(zip(*tensors, strict=True))):
            perturb_(*block, scale=scale, weight_decay=weight_decay)


def clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns copies, in few pieces of memory: cheap to take and to give back, and filled in one go."""
    copies: list[Tensor] = []
    for piece in _pieces(tensors):
        room = torch.empty(
            sum(aligned(tensor.numel()) for tensor in piece), dtype=piece[0].dtype, device=piece[0].device
        )
        for tensor in piece:
            part, room = room[: tensor.numel()], room[aligned(tensor.numel()) :]
            copies.append(part.as_strided(tensor.shape, tensor.stride()) if _fills(tensor) else tensor.clone())
    if copies:
        torch._foreach_copy_(copies, list(tensors))
    return copies


def _pieces(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of the same kind, up to some size."""
    piece: list[Tensor] = []
    size = 0
    for tensor in tensors:
        limit = PIECE_ON_CPU if tensor.device.type == "cpu" else PIECE_ELSEWHERE
        alike = piece and (tensor.device, tensor.dtype) == (piece[0].device, piece[0].dtype)
        if piece and (not alike or size + tensor.numel() > limit):
            yield piece
            piece, size = [], 0
        piece.append(tensor)
        size += tensor.numel()
    if piece:
        yield piece


def _fills(tensor: Tensor) -> bool:
    """Whether the entries of a tensor are a piece of memory without gaps or overlap, in whatever order."""
    return tensor.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def restore_(values: Mapping[Unit, Tensor]) -> None:
    """Writes means back, or a sample; also when this is interrupted."""
    try:
        _write_(values)
    except BaseException:
        _write_(values)  # a second time changes nothing where the first one came
        raise


def _write_(values: Mapping[Unit, Tensor]) -> None:
    # local parts are asked for anew, an engine may have moved them meanwhile
    parameters = {unit: value for unit, value in values.items() if isinstance(unit, Tensor)}
    if parameters:
        torch._foreach_copy_([local(parameter) for parameter in parameters], list(parameters.values()))
    for unit, flat in values.items():
        if isinstance(unit, Pack):
            unit.write_(flat)


def exchange_(means: Mapping[Tensor, Tensor]) -> None:
    """Swaps samples and means: the parameters get the means, also when this is interrupted."""
    alike: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}
    for parameter, mean in means.items():
        alike.setdefault(mean.device, []).append((local(parameter), mean))
    pending = [block for each in alike.values() for block in blocks(list(zip(*each, strict=True)))]
    try:
        while pending:
            here, there = pending[-1]
            samples = clones(here)
            torch._foreach_copy_(here, there)
            pending.pop()  # from here on the parameters are right, whatever happens
            torch._foreach_copy_(there, samples)
    finally:
        for here, there in pending:
            torch._foreach_copy_(here, there)
