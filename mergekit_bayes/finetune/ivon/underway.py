"""What one step has gathered so far: its sample or, with several, the averages over them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from mergekit_bayes.errors import FinetuneError
from mergekit_bayes.finetune.ivon.pack import Group, Pack, Place, Unit, UnitPlace
from mergekit_bayes.finetune.ivon.sharding import local, local_gradient
from mergekit_bayes.finetune.ivon.update import Estimate, differences_

__all__ = ["StepUnderWay", "Work"]

_Row: TypeAlias = tuple[Group, Unit, Tensor, Tensor]
Work: TypeAlias = list[_Row]
"""Group, parameter or pack, local gradient and local estimate of everything that got a gradient."""


class StepUnderWay:
    """Contexts entered since the last step, and what came out of them.

    With one sample, it is kept until the step, which multiplies its distance from the mean by the gradient of then:
    whatever clipping or unscaling did to the gradient reaches the curvature. With several, gradient * distance is
    formed when a sample is complete. Between samples `.grad` is empty; when the last is in, it is the average, for
    clipping to act on.

    Args:
        number: of samples per step.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.contexts = 0
        self.samples: dict[Unit, Tensor] = {}
        self._sums: dict[Tensor, Tensor] = {}
        self._products: dict[Tensor, Tensor] = {}
        self._norms: dict[Tensor, Tensor] = {}

    @property
    def complete(self) -> bool:
        """Whether every sample has been seen equally often, and at least once."""
        return self.contexts > 0 and self.contexts % self.number == 0

    def begin_sample(self, trainable: Iterable[Place]) -> None:
        """Before a sample: moves averages out of `.grad`, where the next backward pass would add to them."""
        if self.number == 1 or not self.complete:
            return
        for group, _, parameter in trainable:
            if parameter in self._sums:
                self._follow(group, parameter)
                parameter.grad = None

    @torch.no_grad()
    def end_sample(self, trainable: Iterable[Place]) -> None:
        """After a sample: with several per step, adds its gradient and its products to the averages.

        Raises:
            FinetuneError: squared gradients of a part of the micro-batches, which say nothing about their sum.
        """
        self.contexts += 1
        if self.number == 1:
            return
        for group, _, parameter in trainable:
            sample, gradient = self.samples.pop(parameter, None), parameter.grad
            if gradient is None:
                continue
            parameter.grad = None
            share = 1 / self.number
            product = _product(group, parameter, local_gradient(parameter, gradient), sample).mul_(share)
            if parameter not in self._sums:
                self._products[parameter], self._sums[parameter] = product, gradient.detach().mul_(share)
            elif group["hess_approx"] == "gradsq" and self.contexts > self.number:
                seen = "IVON: hess_approx 'gradsq' with mc_samples > 1 and the micro-batches of a sample in several"
                raise FinetuneError(f"{seen} contexts; expected all micro-batches of one sample in one context")
            else:
                self._products[parameter].add_(product)
                self._sums[parameter].add_(gradient.detach(), alpha=share)
        self.samples.clear()
        if self.complete:
            for parameter, total in self._sums.items():
                parameter.grad = total
                self._norms[parameter] = _norm(total)

    def fail_sample(self, trainable: Iterable[Place]) -> None:
        """After an exception: with several samples per step, what this one left in `.grad` must not join the next."""
        if self.number > 1:
            for _, _, parameter in trainable:
                parameter.grad = self._sums.get(parameter) if self.complete else None

    def drop_averages(self, trainable: Iterable[Place]) -> list[Tensor]:
        """Forgets the gradients of complete samples; returns them."""
        lost = [parameter.grad for _, _, parameter in trainable if parameter.grad is not None]
        lost += self._sums.values()
        self._sums, self._products, self._norms = {}, {}, {}
        return lost

    @torch.no_grad()
    def gather(
        self, trainable: Iterable[UnitPlace], *, products: bool = False
    ) -> tuple[Work, Callable[[Group], Estimate]]:
        """Returns what the update needs, and what its estimates are; afterwards samples and averages are used up.

        Args:
            trainable: in any order; packs only where there is one sample per step.
            products: form them now, because they have to be averaged over processes.

        Raises:
            FinetuneError: a gradient without a sample, or a sparse one.
        """
        work: Work = []
        for group, _, unit in trainable:
            rows = self._pack_rows(group, unit) if isinstance(unit, Pack) else [self._row(group, unit, products)]
            work += [row for row in rows if row is not None]
        kind = Estimate.PRODUCT if products or self.number > 1 else Estimate.SAMPLE
        return work, lambda group: Estimate.CURVATURE if group["hess_approx"] == "gradsq" else kind

    def unpack(self) -> None:
        """Takes the samples of packs apart: their members go on as parameters of their own."""
        for pack in [unit for unit in self.samples if isinstance(unit, Pack)]:
            self._unpack(pack)

    def _unpack(self, pack: Pack) -> None:
        sample = self.samples.pop(pack, None)
        if sample is not None:
            self.samples.update(zip(pack.members, pack.parts(sample), strict=True))

    def _pack_rows(self, group: Group, pack: Pack) -> Sequence[_Row | None]:
        """The work of a pack, or that of its members where they go different ways."""
        gradient = pack.gradient() if pack.in_step else None
        squared = group["hess_approx"] == "gradsq"
        if gradient is None or not (squared or pack in self.samples):
            self._unpack(pack)
            return [self._row(group, member) for member in pack.members]
        estimate = _squared(group, gradient) if squared else self.samples.pop(pack)
        return [(group, pack, gradient, estimate)]

    def _row(self, group: Group, parameter: Tensor, products: bool = False) -> _Row | None:
        """The work of a parameter; None without a gradient."""
        if self.number > 1:
            if parameter not in self._sums or not self._follow(group, parameter):
                return None
            return group, parameter, local_gradient(parameter, self._sums[parameter]), self._products[parameter]
        if parameter.grad is None:
            return None
        gradient = local_gradient(parameter, parameter.grad)
        sample = self.samples.pop(parameter, None)
        formed = products or sample is None
        estimate = _product(group, parameter, gradient, sample) if formed else cast("Tensor", sample)
        return group, parameter, gradient, estimate

    def _follow(self, group: Mapping[str, Any], parameter: Tensor) -> bool:
        """Does to the products what was done to the averaged gradient since; False if that was dropped."""
        if parameter.grad is None:
            del self._sums[parameter], self._products[parameter], self._norms[parameter]
            return False
        total, before = parameter.grad.detach(), self._norms[parameter]
        ratio = torch.where(before > 0, _norm(total) / before, torch.ones_like(before))
        self._products[parameter].mul_(ratio.square() if group["hess_approx"] == "gradsq" else ratio)
        self._sums[parameter], self._norms[parameter] = total, _norm(total)
        return True


def _product(group: Mapping[str, Any], parameter: Tensor, gradient: Tensor, sample: Tensor | None) -> Tensor:
    """Distance of the sample times gradient, or the curvature estimate of `gradsq`; overwrites the sample."""
    if group["hess_approx"] == "gradsq":
        return _squared(group, gradient)
    if sample is None:
        raise FinetuneError("IVON: a parameter became trainable between the context and the step")
    return differences_([sample], [local(parameter)])[0].mul_(gradient)


def _squared(group: Mapping[str, Any], gradient: Tensor) -> Tensor:
    return gradient.float().square().mul_(group["batch_size"])


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(local(tensor), dtype=torch.float32)
    return norm
