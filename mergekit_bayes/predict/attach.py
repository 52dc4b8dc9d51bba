"""A posterior attached to the parameters of a model in memory: which precision is whose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mergekit_bayes.checkpoint.files import listed, shown
from mergekit_bayes.checkpoint.kronecker_tensors import read_terms
from mergekit_bayes.checkpoint.reader import BlockReader
from mergekit_bayes.checkpoint.shards import raise_together
from mergekit_bayes.errors import (
    CheckpointError,
    MissingTensorError,
    NonFiniteError,
    NonPositivePrecisionError,
    ShapeMismatchError,
    SidecarMismatchError,
)
from mergekit_bayes.posterior import Kronecker
from mergekit_bayes.precision.targets import is_transposed
from mergekit_bayes.predict.belongs import foreign_base, foreign_weights
from mergekit_bayes.predict.names import Weights, updated_weights_of, weights_of
from mergekit_bayes.predict.precisions import Precisions, PrecisionSource, gather_precisions

__all__ = ["AttachedPosterior", "Weight", "attach_posterior"]


@dataclass(frozen=True, eq=False)
class Weight:
    """One parameter with its precision.

    Attributes:
        name: in the file that the precision belongs to.
        parameter: of the model; it holds the mean, or in product space the weight below the update that is described.
        spread: S at data scale: where it is diagonal, of the parameter's shape or 0-dim; else a posterior with
            Kronecker terms around zero, (out_features, in_features).
        turned: whether the parameter is (in_features, out_features).
    """

    name: str
    parameter: nn.Parameter
    spread: Tensor | Kronecker
    turned: bool

    @property
    def precision(self) -> Tensor:
        """The diagonal of S, of the parameter's shape or 0-dim; with Kronecker terms computed when asked for."""
        if not isinstance(self.spread, Kronecker):
            return self.spread
        diagonal = self.spread.precision_tensor()
        return diagonal.mT if self.turned else diagonal


@dataclass(frozen=True, eq=False)
class AttachedPosterior:
    """The posterior of a model in memory; the model holds its mean.

    Attributes:
        model: the model.
        weights: parameters with precisions, sorted by name; every parameter once.
        certain: names of trained parameters without precision, which stay at their mean.
        adapter: the adapter whose factors or updates these are; None for a model on its own.
        of_updates: whether the weights are those of the base below an adapter's updates: what varies is the update, and
            adding its deviation to the weight is the same.
        prior: S_0 that is in every precision, as the sidecar records it; None if that is not known.
    """

    model: nn.Module
    weights: tuple[Weight, ...]
    certain: tuple[str, ...]
    adapter: str | None
    of_updates: bool = False
    prior: float | None = None


def attach_posterior(
    model: nn.Module,
    precision: PrecisionSource | AttachedPosterior,
    *,
    adapter: str | None = None,
    partial: bool = False,
) -> AttachedPosterior:
    """Matches precisions with the parameters of a model.

    Attaching once and passing the result on saves reading and checking the precisions for every sample.

    Args:
        model: any module; of a PEFT model the adapter's factors and stored modules are what is sampled, or with
            precisions in product space its updates of the base's weights.
        precision: by tensor name as in the file (or as in memory), the path of a sidecar or of its folder, or what this
            function returned before.
        adapter: which adapter, where a PEFT model has several active.
        partial: let trained parameters without precision stay at their mean. Without it they are refused, unless a
            sidecar leaves them out because they were not trained.

    Raises:
        SidecarMismatchError: names that the model does not have; weights or a base that the sidecar does not describe.
        MissingTensorError: trained parameters without precision.
        ShapeMismatchError: a precision of another shape than its parameter, or a parameter that is quantised, or in
            product space shared with another layer.
        PlanError: several such reasons, all of them listed.
        NumericalError: precisions that are not positive and finite.
        EvaluateError: an adapter that is merged or switched off, or none of that name.
    """
    if isinstance(precision, AttachedPosterior):
        return precision
    precisions = gather_precisions(precision)
    weights = (updated_weights_of if precisions.of_updates else weights_of)(model, adapter)
    turned = {id(module.get_parameter("weight")) for module in model.modules() if is_transposed(module)}
    problems: list[CheckpointError] = [*_strangers(model, weights, precisions), *_twice(weights, precisions)]
    found = {name: weights.parameters[name] for name in sorted(precisions.values) if name in weights.parameters}
    problems += _misfits(found, precisions, turned)
    problems += _shared(found, precisions, model)
    covered = {id(parameter) for parameter in found.values()}
    certain = [name for name in weights.trained if id(weights.parameters[name]) not in covered]
    if certain and not partial and not precisions.may_be_partial:
        seen = f"{precisions.where}: no precision for {listed(certain)}"
        expected = "expected one for every trained parameter; with partial=True these stay at their mean"
        problems.append(MissingTensorError(f"{seen}; {expected}"))
    if not problems:
        # updates have no values of their own in memory: their factors have
        held = weights_of(model, weights.adapter).parameters if precisions.of_updates else found
        problems += [*foreign_weights(precisions, held), *foreign_base(precisions, model, weights.adapter)]
    raise_together(problems)
    matched = {}
    with BlockReader() as reader:
        for name, parameter in reversed(found.items()):
            weight = _weight(name, parameter, precisions, reader, turned=id(parameter) in turned)
            # the name in the file where precisions came by the name in memory: samples then are the same ones
            matched[id(parameter)] = replace(weight, name=weights.file_name(name))
    ordered = tuple(sorted(matched.values(), key=lambda weight: weight.name))
    return AttachedPosterior(model, ordered, tuple(certain), weights.adapter, precisions.of_updates, precisions.prior)


def _strangers(model: nn.Module, weights: Weights, precisions: Precisions) -> Iterator[SidecarMismatchError]:
    known = weights.parameters.keys() | weights.still | weights.converted
    unknown = sorted(precisions.values.keys() - known)
    converted = sorted(precisions.values.keys() & weights.converted)
    if unknown or not precisions.values:
        seen = f"{precisions.where}: has precisions for {listed(unknown, 5) if unknown else 'nothing'}"
        some = weights.trained[:2] or sorted(weights.parameters)[:2]
        expected = f"expected names of the weights of this {type(model).__name__}, such as {listed(some)}"
        yield SidecarMismatchError(f"{seen}; {expected}{_advice(unknown, weights)}")
    if converted:
        yield SidecarMismatchError(
            f"{precisions.where}: describes {listed(converted, 5)}, which are parts of larger parameters in memory; "
            "expected precisions in the layout in memory; save the model with save_original_format=False"
        )


def _advice(unknown: Sequence[str], weights: Weights) -> str:
    of_factors = any(".lora_" in name for name in unknown)
    if of_factors and weights.adapter is None:
        return "; these describe the factors of an adapter: load it with peft and do not merge it into its base"
    if not of_factors and weights.adapter is not None:
        return "; these describe a full model, and this one has an adapter"
    return "; those that have no place here can be left out of a mapping: read_precisions(path)"


def _twice(weights: Weights, precisions: Precisions) -> Iterator[SidecarMismatchError]:
    """Refuse two different precisions of one parameter under two of its names."""
    first: dict[int, str] = {}
    for name in sorted(precisions.values.keys() & weights.parameters.keys()):
        other = first.setdefault(id(weights.parameters[name]), name)
        if other != name and not torch.equal(precisions.values[other], precisions.values[name]):
            seen = f"{precisions.where}: {shown(other)} and {shown(name)} are one parameter with two precisions"
            yield SidecarMismatchError(f"{seen}; expected the same, or one of them")


def _misfits(
    found: dict[str, nn.Parameter], precisions: Precisions, turned: Collection[int]
) -> Iterator[ShapeMismatchError]:
    for name, parameter in found.items():
        value = precisions.values[name]
        where = f"{precisions.where}: {shown(name)}"
        of_base = precisions.of_updates and parameter.dim() == 2 and id(parameter) in turned
        shape = parameter.shape[::-1] if of_base else parameter.shape
        if not parameter.is_floating_point():
            seen = f"{where}: the parameter is {parameter.dtype}: quantised weights have no posterior to sample"
            base = "a base in floating point, to add samples of its updates to"
            other = base if precisions.of_updates else "an adapter on them, or the weights in floating point"
            yield ShapeMismatchError(f"{seen}; expected {other}")
        elif value.dim() and value.shape != shape:
            seen = f"{where}: precision of shape {tuple(value.shape)}"
            of = "the update" if precisions.of_updates else "the parameter"
            yield ShapeMismatchError(f"{seen}; expected {tuple(shape)}, that of {of}")
        elif parameter.is_meta or hasattr(parameter, "placements"):
            kept = "offloaded" if parameter.is_meta else "sharded"
            yield ShapeMismatchError(f"{where}: the parameter is {kept}; expected a whole parameter in memory")
        elif name in precisions.factors:
            factors = precisions.factors[name]
            sides = (None if factors.output is None else factors.output.shape[1], factors.input.shape[1])
            wanted = tuple(parameter.shape[::-1] if id(parameter) in turned else parameter.shape)
            if len(wanted) != 2 or sides[1] != wanted[1] or sides[0] not in (None, wanted[0]):
                seen = f"{where}: factors of (out, in) = ({sides[0] or 'any'}, {sides[1]})"
                yield ShapeMismatchError(f"{seen}; expected {wanted}, that of the layer")


def _shared(found: dict[str, nn.Parameter], precisions: Precisions, model: nn.Module) -> Iterator[ShapeMismatchError]:
    """Refuse samples of an update whose weight another layer uses, which the update does not change."""
    if not precisions.of_updates:
        return
    uses = Counter(id(each) for module in model.modules() for each in module.parameters(recurse=False))
    for name, parameter in found.items():
        if uses[id(parameter)] > 1:
            seen = f"{precisions.where}: {shown(name)}: its weight is that of another layer too, which has no update"
            yield ShapeMismatchError(f"{seen}; expected a weight of its own, to add samples of the update to")


def _weight(name: str, parameter: nn.Parameter, precisions: Precisions, reader: BlockReader, *, turned: bool) -> Weight:
    value = _checked(precisions.values[name], f"{precisions.where}: precision of {shown(name)}").to(parameter.device)
    if name not in precisions.factors:
        turn = turned and precisions.of_updates and value.dim() > 0
        return Weight(name, parameter, value.mT if turn else value, turned)
    # in float32 at least: of a bfloat16 weight the sample is rounded, not the factors
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    terms = read_terms(precisions.factors[name], reader, dtype=dtype, device=parameter.device)
    if turned and value.dim() and not precisions.of_updates:
        value = value.mT
    shape = parameter.shape[::-1] if turned else parameter.shape
    around = torch.zeros((), dtype=dtype, device=parameter.device).expand(shape)
    return Weight(name, parameter, Kronecker.unchecked(around, value.to(dtype), terms), turned)


def _checked(value: Tensor, where: str) -> Tensor:
    if not value.is_floating_point():
        raise ShapeMismatchError(f"{where}: is {value.dtype}; expected floating point")
    if value.numel():
        low, high = value.aminmax()  # NaN passes through and fails every comparison
        if not (low > -torch.inf and high < torch.inf):
            raise NonFiniteError(f"{where}: {int((~value.isfinite()).sum())} of {value.numel()} entries are not finite")
        if not low > 0:
            seen = f"{where}: {int((value <= 0).sum())} of {value.numel()} entries are not positive"
            raise NonPositivePrecisionError(f"{seen}; the smallest is {float(low):.6g}; expected all > 0")
    return value
