"""What a change of the prior during training does to the posterior."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from mergekit_bayes.finetune.ivon.options import check_group
from mergekit_bayes.finetune.ivon.sharding import local
from mergekit_bayes.finetune.ivon.update import hess_floor

__all__ = ["solve_prior"]


def solve_prior(group: dict[str, Any], states: Mapping[Any, Mapping[str, Any]]) -> None:
    """After a change of weight_decay: keeps h, the data's share; where it is negative, keeps h + delta if lower.

    Args:
        group: of parameters; its `solved_weight_decay` is the delta for which h + delta is known to be positive.
        states: of the optimizer.

    Raises:
        FinetuneError: the new value is out of range.
    """
    delta, old = group["weight_decay"], group["solved_weight_decay"]
    if delta == old:
        return
    check_group(group)
    kept = 0
    for parameter in group["params"]:
        if delta < old and states.get(parameter):
            hess = local(states[parameter]["hess"])
            kept += int((hess < 0).sum())
            hess.copy_(torch.where(hess < 0, hess + (old - delta), hess)).clamp_(min=hess_floor(delta))
    if kept:
        message = f"IVON: weight_decay changed from {old} to {delta}; {kept} weights of negative curvature keep "
        warnings.warn(message + "the precision they had", stacklevel=5)
    group["solved_weight_decay"] = delta
