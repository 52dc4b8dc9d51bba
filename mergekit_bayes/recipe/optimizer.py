"""The section `optimizer`: IVON, which leaves a posterior behind, or AdamW, which does not.

optimizer: ivon
optimizer: {name: ivon, lr: 0.2, clip_radius: 1e-3, temperature: 0.05}
optimizer: {name: adamw, lr: 2e-4}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from mergekit_bayes.recipe import field
from mergekit_bayes.recipe.problem import Refusal, problems_of, refusal, show
from mergekit_bayes.recipe.spec import Spec, checked

_decay = field.between(0, 1, below=True)
_name = field.choice(
    "ivon",
    "adamw",
    also={
        "adam": "adamw",
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "adamw_8bit": "adamw",
        "adamw_bnb_8bit": "adamw",
        "paged_adamw_8bit": "adamw",
        "paged_adamw_32bit": "adamw",
        "von": "ivon",
        "vogn": "ivon",
        "ivon_lora": "ivon",
        "ivon-lora": "ivon",
    },
)


def _clip_radius(value: object) -> float | None:
    if value == math.inf:
        raise refusal("found infinity; write null for no bound.")
    return None if value is None else field.positive(value)


class IvonSpec(Spec):
    """IVON (Shen et al., ICML 2024): options of `mergekit_bayes.IVON`.

    No weight moves further in a step than lr times clip_radius; with the defaults that is as far as AdamW's first steps
    go with its default lr.

    Attributes:
        name: `ivon`.
        lr: peak step size, which the schedule scales.
        ess: effective sample size; None: the training units of the run over temperature.
        temperature: T = N / ess of the posterior that is sampled in training. At 1, which is Bayes' rule, the noise
            of a short run hides what is to be learned.
        hess_init: initial curvature h0 of the mean loss; None: from noise_to_weight.
        noise_to_weight: size of the noise over the size of the weights at the start, from which hess_init follows.
        beta1: decay of the momentum.
        beta2: decay of the curvature; None: from the length of the run.
        weight_decay: delta, the prior precision over ess.
        mc_samples: samples per step.
        hess_approx: `price` (noise times gradient) or `gradsq` (squared gradient).
        clip_radius: bound of every entry of the preconditioned direction; None for none.
        debias: divide the momentum by 1 - beta1^t.
        rescale_lr: multiply lr by hess_init + weight_decay.
        antithetic: samples in pairs of opposite noise; mc_samples must be even.
        noise: `shared`: all processes see the same weights; `per_process`: each draws its own.
    """

    name: Literal["ivon"] = "ivon"
    lr: Annotated[float, checked(field.positive)] = 0.2
    ess: Annotated[float | None, checked(field.optional(field.positive))] = None
    temperature: Annotated[float, checked(field.positive)] = 0.05
    hess_init: Annotated[float | None, checked(field.optional(field.positive))] = None
    noise_to_weight: Annotated[float, checked(field.positive)] = 0.1
    beta1: Annotated[float, checked(_decay)] = 0.9
    beta2: Annotated[float | None, checked(field.optional(field.between(0, 1)))] = None
    weight_decay: Annotated[float, checked(field.between(0))] = 0.0
    mc_samples: Annotated[int, checked(field.integer(1))] = 1
    hess_approx: Annotated[Literal["price", "gradsq"], checked(field.choice("price", "gradsq"))] = "price"
    clip_radius: Annotated[float | None, checked(_clip_radius)] = 1e-3
    debias: Annotated[bool, checked(field.boolean)] = True
    rescale_lr: Annotated[bool, checked(field.boolean)] = False
    antithetic: Annotated[bool, checked(field.boolean)] = False
    noise: Annotated[Literal["shared", "per_process"], checked(field.choice("shared", "per_process"))] = "shared"

    def without_effect(self) -> frozenset[str]:
        """What is given need not follow from anything."""
        sources = {"temperature": self.ess, "noise_to_weight": self.hess_init}
        return frozenset(name for name, given in sources.items() if given is not None)


class AdamWSpec(Spec):
    """AdamW (Loshchilov and Hutter, ICLR 2019): options of `torch.optim.AdamW`.

    Attributes:
        name: `adamw`.
        lr: peak step size, which the schedule scales.
        beta1: decay of the momentum.
        beta2: decay of the squared gradient.
        eps: added to the square root of it.
        weight_decay: decoupled weight decay.
        amsgrad: use the largest squared gradient so far.
    """

    name: Literal["adamw"] = "adamw"
    lr: Annotated[float, checked(field.positive)] = 2e-4
    beta1: Annotated[float, checked(_decay)] = 0.9
    beta2: Annotated[float, checked(_decay)] = 0.999
    eps: Annotated[float, checked(field.positive)] = 1e-8
    weight_decay: Annotated[float, checked(field.between(0))] = 0.0
    amsgrad: Annotated[bool, checked(field.boolean)] = False


def optimizer_mapping(value: object) -> object:
    """The section written out, also where it is only a name; without a name it is IVON's."""
    if isinstance(value, IvonSpec | AdamWSpec):
        return value
    if value is None or isinstance(value, str):
        return {"name": _name("ivon" if value is None else value)}
    if not isinstance(value, Mapping):
        raise refusal(f"expected `ivon`, `adamw` or a mapping of options, found {show(value)}.")
    try:
        return {**value, "name": _name(value.get("name", "ivon"))}
    except Refusal as error:
        raise refusal(*problems_of(error, "name")) from None


OptimizerSpec: TypeAlias = Annotated[
    IvonSpec | AdamWSpec, Field(discriminator="name"), BeforeValidator(optimizer_mapping)
]
