"""What is known of one source's weights: the posterior that its sidecar, the recipe or the prior gives it."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from mergekit_bayes.checkpoint.adapter import Adapter, LoraModule
from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.checkpoint.kronecker_tensors import kronecker_tensors
from mergekit_bayes.checkpoint.sidecar import Sidecar
from mergekit_bayes.errors import MissingInputError
from mergekit_bayes.merge.curvature import Curvature
from mergekit_bayes.merge.inputs import Input
from mergekit_bayes.merge.setting import Setting
from mergekit_bayes.merge.steps import LowRank, Operand

_PREFIX = "base_model.model."


class Names(NamedTuple):
    """What one tensor is called where its precision may stand.

    Attributes:
        stored: in a sidecar that has the names of a file.
        base: in the base.
        update: in a sidecar of an adapter's updates (space product).
    """

    stored: str
    base: str
    update: str


def names_of(tensor: TensorInfo, base: str, module: LoraModule | None = None) -> Names:
    """The names of a dense tensor.

    Args:
        tensor: as a checkpoint or an adapter stores it, before an update.
        base: its name in the base.
        module: what an adapter adds to it.
    """
    update = tensor.name.removeprefix(_PREFIX) if module is None else Adapter.base_tensor(module.name)
    return Names(tensor.name, base, update)


def posterior_of(setting: Setting, source: Input, operand: Operand, names: Names) -> Operand | None:
    """The operand with the precision that recipe and sidecar give it.

    Args:
        setting: for method, prior and scale; sources that get the prior are noted in it.
        source: the input that the operand belongs to.
        operand: mean and low-rank update, without precisions.
        names: of the tensor.

    Returns:
        The operand; None where the method needs a precision and there is none. A tensor that a sidecar leaves
        out, and every tensor of a source without a sidecar where the method allows one, has the prior's.
    """
    if not setting.uses_precision:
        return replace(operand, precision=1.0)
    if source.scalar_precision is not None:
        return replace(operand, precision=source.scalar_precision)
    if source.sidecar is not None:
        found = _from_sidecar(setting, source, source.sidecar, operand, names)
        if found is not None:
            return replace(found, of_sidecar=True, floor=setting.recipe.precision.source_floor)
    if setting.needs_prior and (source.sidecar is not None or setting.method.precision == "optional"):
        if source.adapter is None or operand.low_rank is not None or names.stored in source.adapter.tensors:
            setting.prior_only.setdefault(source.label, []).append(names.stored)
        return setting.with_prior(operand, names.base)
    return None


def no_precision(setting: Setting, source: Input, name: str) -> MissingInputError:
    """The refusal of a source whose precision the method needs."""
    # Without a sidecar the refusal is the same for every tensor, and is told once.
    seen = f" for {name} ({source.sidecar.path.name} has none)" if source.sidecar is not None else " (no sidecar)"
    return MissingInputError(
        f"{source.label}: no precision{seen}; {setting.method.name} needs one for every source; "
        "add `precision:` to this source, or use a method without precisions (linear, task_arithmetic)"
    )


def _from_sidecar(setting: Setting, source: Input, sidecar: Sidecar, operand: Operand, names: Names) -> Operand | None:
    """The operand with what a sidecar says of it: a diagonal, Kronecker terms beside one or the prior, or factors."""
    divisor, share = setting.divisors[source.label], setting.prior_share(source)
    of_updates = sidecar.metadata.space == "product"
    name = names.update if of_updates else names.stored
    factors = kronecker_tensors(sidecar, name)
    curvature = None if factors is None else Curvature(factors, divisor)
    if name in sidecar.tensors:
        return replace(
            operand,
            precision=sidecar.tensors[name],
            divisor=divisor,
            prior_share=share,
            curvature=curvature,
            of_update=of_updates,
        )
    if curvature is not None:
        return replace(setting.with_prior(operand, names.base), curvature=curvature)
    low_rank = _with_factor_precisions(operand.low_rank, sidecar)
    if low_rank is None:
        return None
    # In factor space S_0 takes the prior's place factor by factor, elsewhere once dW is formed.
    if setting.space == "factor":
        return replace(operand, low_rank=low_rank, divisor=divisor, prior_share=share)
    within = sidecar.metadata.prior_precision if setting.needs_prior else None
    return replace(operand, low_rank=replace(low_rank, prior=within or None), divisor=divisor)


def _with_factor_precisions(low_rank: LowRank | None, sidecar: Sidecar) -> LowRank | None:
    tensors = sidecar.tensors
    if low_rank is None or low_rank.a.name not in tensors or low_rank.b.name not in tensors:
        return None
    return replace(
        low_rank,
        precision_a=tensors[low_rank.a.name],
        precision_b=tensors[low_rank.b.name],
        trained_scaling=sidecar.metadata.adapter_scaling or low_rank.scaling,
    )
