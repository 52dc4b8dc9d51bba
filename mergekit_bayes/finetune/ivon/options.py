"""Which values the options of an optimizer and of its parameter groups may take."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from mergekit_bayes.errors import FinetuneError

__all__ = ["check_group", "check_whole"]


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "lr": (lambda v: bool(v >= 0) and math.isfinite(float(v)), "a finite number >= 0"),
    "ess": (lambda v: _number(v) and v > 0, "a finite number > 0"),
    "hess_init": (lambda v: _number(v) and v > 0, "a finite number > 0"),
    "beta1": (lambda v: _number(v) and 0 <= v < 1, "a number in [0, 1)"),
    "beta2": (lambda v: _number(v) and 0 <= v <= 1, "a number in [0, 1]"),
    "weight_decay": (lambda v: _number(v) and v >= 0, "a finite number >= 0"),
    "hess_approx": (lambda v: v in ("price", "gradsq"), "'price' or 'gradsq'"),
    "clip_radius": (lambda v: isinstance(v, int | float) and v > 0, "a number > 0 or infinity"),
    "debias": (lambda v: isinstance(v, bool), "True or False"),
    "rescale_lr": (lambda v: isinstance(v, bool), "True or False"),
    "batch_size": (lambda v: _number(v) and v > 0, "a finite number > 0"),
}


def check_group(group: Mapping[str, Any]) -> None:
    """Checks the options and the parameters of one group.

    Raises:
        FinetuneError: all faults in one message.
    """
    faults = [
        f"{key} is {group[key]!r}, expected {text}" for key, (rule, text) in _RULES.items() if not rule(group[key])
    ]
    for parameter in group["params"]:
        if not parameter.is_floating_point():
            faults.append(f"a parameter of dtype {parameter.dtype}, expected real floating point")
    if faults:
        raise FinetuneError(f"IVON: {'; '.join(faults)}")


def check_whole(*, mc_samples: int, antithetic: bool, noise: str, fused: bool | None) -> None:
    """Checks the options that are the same for all groups.

    Raises:
        FinetuneError: the first that is out of range.
    """
    if mc_samples < 1 or (antithetic and mc_samples % 2):
        wanted = "an even number" if antithetic else "1 or more"
        raise FinetuneError(f"IVON: mc_samples is {mc_samples}, expected {wanted}")
    if noise not in ("shared", "per_process"):
        raise FinetuneError(f"IVON: noise is {noise!r}, expected 'shared' or 'per_process'")
    if fused not in (None, True, False):
        raise FinetuneError(f"IVON: fused is {fused!r}, expected True, False or None")
