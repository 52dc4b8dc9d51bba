"""Small parameters side by side in memory: what costs a launch, or a line of Python, is then done once for all.

An adapter has hundreds of small factors. On an accelerator the time of a step goes into starting operations on each of
them, not into the operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from mergekit_bayes.finetune.ivon.fused import SMALLEST_ON_CPU
from mergekit_bayes.finetune.ivon.sharding import is_sharded

__all__ = ["Group", "Pack", "Packs", "Place", "Unit", "UnitPlace"]

SMALLER_ON_CPU, SMALLER_ELSEWHERE = SMALLEST_ON_CPU, 1 << 22
"""Entries below which a parameter goes into a pack: it is copied in and out, which has to cost less than a call."""

PACK = 1 << 24
"""Entries of a pack at most: what a step borrows for one is bounded."""


class Pack:
    """Neighbours in the stream of noise, of one group, device and dtype; one flat parameter to the rest of a step.

    Args:
        group: of the optimizer.
        members: parameters; all but the last have as many entries as their place in the stream.
        states: of the members; their momentum and curvature become parts of two flat tensors.

    Attributes:
        momentum: g of all members, flat.
        hess: h of all members, flat.
    """

    def __init__(self, group: dict[str, Any], members: Sequence[Tensor], states: Sequence[dict[str, Any]]) -> None:
        self.group, self.members, self.states = group, list(members), list(states)
        self._sizes = [member.numel() for member in members]
        self._flat = [member.detach().view(-1) for member in members]
        self._addresses = [member.data_ptr() for member in members]
        self.momentum, self.hess = self._together("momentum"), self._together("hess")
        self._held = [(state["momentum"], state["hess"]) for state in self.states]

    def _together(self, key: str) -> Tensor:
        flat = _joined([state[key] for state in self.states])
        for state, part in zip(self.states, self.parts(flat), strict=True):
            state[key] = part
        return flat

    def holds(self, states: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether members and their states are still where they were when this was made.

        Args:
            states: of the optimizer, by parameter.
        """
        # a state that was cleared or exchanged was so for all of its members
        return states.get(self.members[0]) is self.states[0] and all(
            state["momentum"] is momentum and state["hess"] is hess and member.data_ptr() == address
            for state, (momentum, hess), member, address in zip(
                self.states, self._held, self.members, self._addresses, strict=True
            )
        )

    @property
    def in_step(self) -> bool:
        """Whether all members have taken equally many steps."""
        first, *others = self.states
        return all(state["step"] == first["step"] for state in others)

    def parts(self, flat: Tensor) -> list[Tensor]:
        """Returns views of a flat tensor, one for every member, in its shape."""
        return list(_unflatten_dense_tensors(flat, self.members))  # type: ignore[no-untyped-call]

    def joined(self) -> Tensor:
        """Returns a copy of the members, flat."""
        return torch.cat(self._flat)

    def write_(self, flat: Tensor) -> None:
        """Gives the members the entries of a flat tensor."""
        torch.split_with_sizes_copy(flat, self._sizes, out=self._flat)

    def gradient(self) -> Tensor | None:
        """Returns a copy of the members' gradients, flat; None unless all have one of the same, dense kind."""
        gradients = [member.grad for member in self.members if member.grad is not None]
        if len(gradients) < len(self.members) or any(
            each.dtype is not gradients[0].dtype or each.layout != torch.strided or is_sharded(each)
            for each in gradients
        ):
            return None
        return _joined(gradients)


Group: TypeAlias = dict[str, Any]
Unit: TypeAlias = Tensor | Pack
Place: TypeAlias = tuple[Group, int, Tensor]
"""Group, begin in the stream of noise, and a trainable parameter."""
UnitPlace: TypeAlias = tuple[Group, int, Unit]
"""The same of a parameter or a pack."""


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    flat: Tensor = _flatten_dense_tensors(tensors)  # type: ignore[no-untyped-call]
    return flat


class Packs:
    """The packs among the trainable parameters of an optimizer, kept from step to step as long as they hold."""

    def __init__(self) -> None:
        self._trainable: list[Tensor] = []
        self._units: list[UnitPlace] = []

    def units(self, trainable: Sequence[Place], states: Mapping[Tensor, dict[str, Any]]) -> list[UnitPlace] | None:
        """Returns packs and all parameters that are in none, in the order of the stream; None if they no longer hold.

        Args:
            trainable: all parameters, in that order.
            states: of the optimizer, by parameter.
        """
        same = len(trainable) == len(self._trainable) and all(
            parameter is known for (*_, parameter), known in zip(trainable, self._trainable, strict=True)
        )
        holding = same and all(unit.holds(states) for *_, unit in self._units if isinstance(unit, Pack))
        return self._units if holding and self._units else None

    def form(self, trainable: Sequence[Place], states: Mapping[Tensor, dict[str, Any]]) -> list[UnitPlace]:
        """Makes packs anew, and returns what `units` will."""
        self._trainable = [parameter for *_, parameter in trainable]
        self._units = []
        for run in _runs(trainable):
            group, at, first = run[0]
            if len(run) == 1:
                self._units.append((group, at, first))
            else:
                members = [parameter for *_, parameter in run]
                self._units.append((group, at, Pack(group, members, [states[each] for each in members])))
        return self._units


def _runs(trainable: Sequence[Place]) -> Iterator[list[Place]]:
    """Cuts the stream into what can be a pack, and single parameters."""
    run: list[Place] = []
    size = 0
    for place in trainable:
        small = _is_small(place[2])
        if run and not (small and _follows(run[-1], place) and size + place[2].numel() <= PACK):
            yield run
            run, size = [], 0
        run.append(place)
        size += place[2].numel()
        if not small:
            yield run
            run, size = [], 0
    if run:
        yield run


def _is_small(parameter: Tensor) -> bool:
    limit = SMALLER_ON_CPU if parameter.device.type == "cpu" else SMALLER_ELSEWHERE
    return not is_sharded(parameter) and 0 < parameter.numel() < limit and parameter.is_contiguous()


def _follows(last: Place, place: Place) -> bool:
    """Whether a parameter begins in the stream where the last one ends, and is of its kind."""
    (group, at, before), (other, begin, parameter) = last, place
    return (
        group is other
        and at + before.numel() == begin
        and (before.dtype, before.device) == (parameter.dtype, parameter.device)
    )
