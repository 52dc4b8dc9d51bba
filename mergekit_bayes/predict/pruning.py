r"""Pruning by signal to noise: the weights whose mean is smallest beside its own uncertainty become zero.

    |m| sqrt(S) = |m| / sigma

(Graves 2011, "Practical variational inference for neural networks"; Blundell et al. 2015, arXiv 1505.05424, section
5; for LoRA with IVON, arXiv 2506.14280.) Where S is nearly the same everywhere this is pruning by magnitude under
another name; the report says how far the two agree. Of a precision with Kronecker terms this is its diagonal: what
the weight is known to when all others stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from mergekit_bayes.errors import EvaluateError, NonFiniteError
from mergekit_bayes.predict.attach import AttachedPosterior, Weight, attach_posterior
from mergekit_bayes.predict.precisions import PrecisionSource
from mergekit_bayes.predict.smallest import smallest_masks

__all__ = ["Pruning", "prune_posterior"]

_SAME = 0.95


@dataclass(frozen=True, eq=False)
class _Removed:
    parameter: nn.Parameter
    places: tuple[Tensor, ...]
    values: Tensor


class Pruning:
    """What was pruned; as a context manager it is undone at the end.

    Attributes:
        entries: of all weights with a precision.
        pruned: entries set to zero.
        overlap: share of the pruned that pruning as many by magnitude would have taken too; 1 if none were pruned.
        by_weight: share of its entries that each weight lost, by name.
    """

    def __init__(self, removed: dict[str, _Removed], entries: int, overlap: float) -> None:
        self._removed = removed
        self.entries = entries
        self.pruned = sum(len(part.values) for part in removed.values())
        self.overlap = overlap
        self.by_weight = {name: len(part.values) / max(1, part.parameter.numel()) for name, part in removed.items()}

    @property
    def is_magnitude_pruning(self) -> bool:
        """Whether pruning by magnitude would have taken the same entries, but for one in twenty at most."""
        return self.overlap >= _SAME

    def __str__(self) -> str:
        share = self.pruned / max(1, self.entries)
        text = f"pruned {self.pruned} of {self.entries} entries ({share:.1%}) by |m| sqrt(S); "
        text += f"pruning by |m| alone would take {self.overlap:.1%} of the same"
        chance = f" ({share:.1%} would be chance)"
        if self.is_magnitude_pruning and self.pruned:
            return f"{text}: beside |m| the precision hardly varies, and this is magnitude pruning"
        return text + chance

    def restore(self) -> None:
        """Puts the pruned entries back, bit for bit; what happened to others meanwhile stays."""
        with torch.no_grad():
            for part in self._removed.values():
                part.parameter[part.places] = part.values
        self._removed = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


@torch.no_grad()
def prune_posterior(model: nn.Module, precision: PrecisionSource | AttachedPosterior, share: float) -> Pruning:
    """Sets the share of entries with the lowest |m| sqrt(S), over all weights together, to zero.

    It happens at once and in place; used as `with prune_posterior(...) as pruning:` it is undone at the end, also
    after an exception. Samples drawn afterwards vary around zero where entries were pruned. Attach the posterior
    before pruning if it comes from a sidecar: the weights then no longer are what the sidecar describes.

    Args:
        model: holds the mean.
        precision: as `attach_posterior` takes it.
        share: of the entries of all weights with a precision, in [0, 1]; as many as that rounds to. Of equal entries
            those go first whose name and place come first.

    Raises:
        EvaluateError: a share outside [0, 1], or precisions in product space.
        NonFiniteError: a mean is NaN or infinite.
        CheckpointError: the precisions do not fit the model; see `attach_posterior`.
    """
    if not 0 <= share <= 1:
        raise EvaluateError(f"pruning: share is {share}; expected a number from 0 to 1")
    posterior = attach_posterior(model, precision)
    if posterior.of_updates:
        raise EvaluateError(
            "pruning: the precisions are of the updates of an adapter, whose entries the model does not hold; expected "
            "precisions of its factors"
        )
    weights = posterior.weights
    for weight in weights:
        if not weight.parameter.isfinite().all():
            raise NonFiniteError(f"pruning: {weight.name} holds NaN or infinity; expected a finite mean")
    entries = sum(weight.parameter.numel() for weight in weights)
    count = round(share * entries)
    removed: dict[str, _Removed] = {}
    common = 0
    masks = zip(weights, _masks(weights, _signal, count), _masks(weights, _magnitude, count), strict=True)
    for weight, mask, by_magnitude in masks:
        common += int((mask & by_magnitude).sum())
        places = mask.nonzero(as_tuple=True)
        removed[weight.name] = _Removed(weight.parameter, places, weight.parameter.detach()[places])
    for part in removed.values():
        part.parameter[part.places] = 0
    return Pruning(removed, entries, common / count if count else 1.0)


def _masks(weights: tuple[Weight, ...], score: Callable[[Weight], Tensor], count: int) -> Iterator[Tensor]:
    return smallest_masks(lambda: (score(weight) for weight in weights), count)


def _signal(weight: Weight) -> Tensor:
    return _magnitude(weight) * weight.precision.to(weight.parameter.device).sqrt().float()


def _magnitude(weight: Weight) -> Tensor:
    return weight.parameter.detach().float().abs()
