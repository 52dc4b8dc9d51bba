"""One step of everything that got a gradient, sorted into compiled calls and into blocks of foreach operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_bayes.finetune.ivon.fused import can_fuse, fused_update_
from mergekit_bayes.finetune.ivon.pack import Group, Pack
from mergekit_bayes.finetune.ivon.sharding import local
from mergekit_bayes.finetune.ivon.underway import Work
from mergekit_bayes.finetune.ivon.update import Coefficients, Estimate, blocks, update_

__all__ = ["apply_"]


@torch.no_grad()
def apply_(
    work: Work, states: Mapping[Tensor, dict[str, Any]], kind: Callable[[Group], Estimate], *, fusing: bool
) -> None:
    """Updates mean, momentum and curvature, and counts the step; parameters without a gradient stay as they are.

    Args:
        work: from `StepUnderWay.gather`.
        states: of the optimizer, by parameter.
        kind: what the estimates of a group are.
        fusing: use compiled functions where they pay.
    """
    lists: dict[tuple[int, torch.device, int], list[list[Tensor]]] = {}
    coefficients: dict[tuple[int, int], Coefficients] = {}
    for group, unit, gradient, estimate in work:
        members = unit.states if isinstance(unit, Pack) else [states[unit]]
        for state in members:
            state["step"] += 1
            state["hess_init_share"] *= group["beta2"]
        which, count = id(group), members[0]["step"]
        if (which, count) not in coefficients:
            coefficients[which, count] = Coefficients.of(group, count, kind(group))
        if isinstance(unit, Pack):
            _apply_to_pack(unit, gradient, estimate, coefficients[which, count], fusing=fusing)
            continue
        (state,) = members
        row = (local(unit), local(state["momentum"]), local(state["hess"]), gradient, estimate)
        if fusing and can_fuse(*row):
            fused_update_(*row, coefficients=coefficients[which, count])
            continue
        tensors = lists.setdefault((which, row[0].device, count), [[], [], [], [], []])
        for each, tensor in zip(tensors, row, strict=True):
            each.append(tensor)
    for (which, _, count), tensors in lists.items():
        for block in blocks(tensors):
            update_(*block, coefficients=coefficients[which, count])


def _apply_to_pack(pack: Pack, gradient: Tensor, estimate: Tensor, coefficients: Coefficients, *, fusing: bool) -> None:
    mean = pack.joined()
    row = (mean, pack.momentum, pack.hess, gradient, estimate)
    if fusing and can_fuse(*row):
        fused_update_(*row, coefficients=coefficients)
    else:
        for block in blocks([[tensor] for tensor in row]):
            update_(*block, coefficients=coefficients)
    pack.write_(mean)
