"""From the recipe's section to an optimizer, with starting values for what the recipe leaves open."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mergekit_bayes.finetune.ivon import IVON, starting_values

if TYPE_CHECKING:
    from mergekit_bayes.recipe.finetune import AdamWSpec, IvonSpec

__all__ = ["Start", "build_optimizer", "starting_point", "take_course"]


@dataclass(frozen=True)
class Start:
    """Where IVON starts: given by the recipe, or derived.

    Attributes:
        ess: effective sample size.
        hess_init: initial curvature.
        beta2: decay of the curvature.
        noise_to_weight: of the first step, with these; over the tensors that are not zero.
        derived: names of those that the recipe left open.
    """

    ess: float
    hess_init: float
    beta2: float
    noise_to_weight: float
    derived: Sequence[str]

    def line(self) -> str:
        """Returns the values for a terminal, derived ones marked."""
        values = {"ess": self.ess, "hess_init": self.hess_init, "beta2": self.beta2}
        shown = [f"{name} {value:.6g}{' (derived)' if name in self.derived else ''}" for name, value in values.items()]
        return f"IVON starts with {', '.join(shown)}: noise is {self.noise_to_weight:.3g} of the weights"


def starting_point(spec: IvonSpec, parameters: Sequence[torch.Tensor], *, units_seen: int, steps: int) -> Start:
    """Returns the recipe's ess, hess_init and beta2, and what follows for those it leaves open.

    Without ess it is the number of units the run will see over the temperature; without hess_init the noise is the
    recipe's noise_to_weight; without beta2 the initial curvature keeps 5% of the curvature at the end of the run.

    Args:
        spec: the recipe's section.
        parameters: trainable ones, at their initial values.
        units_seen: training units of the run, repetitions counted.
        steps: optimizer steps of the run.

    Raises:
        FinetuneError: weight_decay does not allow that much noise.
    """
    ess = units_seen / spec.temperature if spec.ess is None else spec.ess
    derived = starting_values(
        parameters,
        units_seen=ess,  # type: ignore[arg-type]  # h0 follows from ess, whole or not
        steps=steps,
        noise_to_weight=spec.noise_to_weight,
        weight_decay=spec.weight_decay,
    )
    hess_init = derived.hess_init if spec.hess_init is None else spec.hess_init
    # the same root mean square as in the derivation, solved for the ratio
    unit = derived.noise_to_weight * math.sqrt(derived.ess * (derived.hess_init + spec.weight_decay))
    return Start(
        ess=ess,
        hess_init=hess_init,
        beta2=derived.beta2 if spec.beta2 is None else spec.beta2,
        noise_to_weight=unit / math.sqrt(ess * (hess_init + spec.weight_decay)),
        derived=tuple(name for name in ("ess", "hess_init", "beta2") if getattr(spec, name) is None),
    )


def build_optimizer(
    spec: IvonSpec | AdamWSpec,
    parameters: Iterable[torch.Tensor],
    *,
    start: Start | None = None,
    seed: int = 0,
    batch_units: float = 1.0,
) -> torch.optim.Optimizer:
    """Returns the optimizer of a recipe.

    Args:
        spec: the recipe's section.
        parameters: trainable ones, in a fixed order: it names IVON's noise.
        start: for IVON, from `starting_point`.
        seed: of IVON's noise.
        batch_units: training units of a typical step, which `gradsq` multiplies squared gradients by.
    """
    if spec.name == "adamw":
        return _adamw(spec, list(parameters))
    assert start is not None  # whoever builds IVON has asked for its starting point
    return IVON(
        parameters,
        lr=spec.lr,
        ess=start.ess,
        hess_init=start.hess_init,
        beta1=spec.beta1,
        beta2=start.beta2,
        weight_decay=spec.weight_decay,
        mc_samples=spec.mc_samples,
        hess_approx=spec.hess_approx,
        clip_radius=math.inf if spec.clip_radius is None else spec.clip_radius,
        debias=spec.debias,
        rescale_lr=spec.rescale_lr,
        batch_size=batch_units,
        antithetic=spec.antithetic,
        noise=spec.noise,
        seed=seed,
    )


def take_course(optimizer: torch.optim.Optimizer, spec: IvonSpec | AdamWSpec, names: Iterable[str]) -> None:
    """Gives an optimizer that was loaded from a checkpoint the recipe's values of some options.

    Args:
        optimizer: with the options it was saved with.
        spec: the recipe's section.
        names: of the options; the learning rate is set at every step anyway, and one that the recipe leaves open stays.
    """
    for name in names:
        value = getattr(spec, name)
        if name == "clip_radius" and value is None:
            value = math.inf
        for group in optimizer.param_groups:
            if name in {"beta1", "beta2"} and spec.name == "adamw":
                group["betas"] = (spec.beta1, spec.beta2)
            elif name != "lr" and value is not None:
                group[name] = value


def _adamw(spec: AdamWSpec, parameters: list[torch.Tensor]) -> torch.optim.AdamW:
    options: dict[str, Any] = {
        "lr": spec.lr,
        "betas": (spec.beta1, spec.beta2),
        "eps": spec.eps,
        "weight_decay": spec.weight_decay,
        "amsgrad": spec.amsgrad,
    }
    try:
        return torch.optim.AdamW(parameters, **options, fused=True)
    except RuntimeError:  # a device or dtype for which there is no fused kernel
        return torch.optim.AdamW(parameters, **options)
