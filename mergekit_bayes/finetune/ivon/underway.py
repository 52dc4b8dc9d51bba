"""What one step has gathered so far: its noise and, with several samples, the averages over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_bayes.errors import FinetuneError
from mergekit_bayes.finetune.ivon.sharding import local, local_gradient
from mergekit_bayes.finetune.ivon.update import Estimate

__all__ = ["StepUnderWay", "Work"]

Group = dict[str, Any]
Work = list[tuple[Group, Tensor, Tensor, Tensor]]
"""Group, parameter, local gradient and local estimate of everything that got a gradient."""


class StepUnderWay:
    """Contexts entered since the last step, and what came out of them.

    With one sample, its noise is kept until the step, which multiplies it by the gradient of then: whatever clipping or
    unscaling did to the gradient reaches the curvature. With several, noise * gradient is formed when a sample is
    complete. Between samples `.grad` is empty; when the last is in, it is the average, for clipping to act on.

    Args:
        samples: per step.
    """

    def __init__(self, samples: int) -> None:
        self.samples = samples
        self.contexts = 0
        self.noise: dict[Tensor, Tensor] = {}
        self._sums: dict[Tensor, Tensor] = {}
        self._products: dict[Tensor, Tensor] = {}
        self._norms: dict[Tensor, Tensor] = {}

    @property
    def complete(self) -> bool:
        """Whether every sample has been seen equally often, and at least once."""
        return self.contexts > 0 and self.contexts % self.samples == 0

    def begin_sample(self, trainable: Iterable[tuple[Group, Tensor]]) -> None:
        """Before a sample: moves averages out of `.grad`, where the next backward pass would add to them."""
        if self.samples == 1 or not self.complete:
            return
        for group, parameter in trainable:
            if parameter in self._sums:
                self._follow(group, parameter)
                parameter.grad = None

    @torch.no_grad()
    def end_sample(self, trainable: Iterable[tuple[Group, Tensor]]) -> None:
        """After a sample: with several per step, adds its gradient and its noise * gradient to the averages.

        Raises:
            FinetuneError: squared gradients of a part of the micro-batches, which say nothing about their sum.
        """
        self.contexts += 1
        if self.samples == 1:
            return
        for group, parameter in trainable:
            z, gradient = self.noise.pop(parameter, None), parameter.grad
            if z is None or gradient is None:
                continue
            parameter.grad = None
            share = 1 / self.samples
            product = _estimate(group, z, local_gradient(parameter, gradient)).mul_(share)
            if parameter not in self._sums:
                self._products[parameter], self._sums[parameter] = product, gradient.detach().mul_(share)
            elif group["hess_approx"] == "gradsq" and self.contexts > self.samples:
                seen = "IVON: hess_approx 'gradsq' with mc_samples > 1 and the micro-batches of a sample in several"
                raise FinetuneError(f"{seen} contexts; expected all micro-batches of one sample in one context")
            else:
                self._products[parameter].add_(product)
                self._sums[parameter].add_(gradient.detach(), alpha=share)
        self.noise.clear()
        if self.complete:
            for parameter, total in self._sums.items():
                parameter.grad = total
                self._norms[parameter] = _norm(total)

    def fail_sample(self) -> None:
        """After an exception: with several samples per step, what this one left in `.grad` must not join the next."""
        if self.samples > 1:
            for parameter in self.noise:
                parameter.grad = None
            self.noise.clear()
            if self.complete:
                for parameter, total in self._sums.items():
                    parameter.grad = total

    def drop_averages(self) -> list[Tensor]:
        """Forgets the gradients of complete samples, but not the noise; returns them."""
        lost = [parameter.grad for parameter in self.noise if parameter.grad is not None]
        lost += self._sums.values()
        self._sums, self._products, self._norms = {}, {}, {}
        return lost

    @torch.no_grad()
    def gather(self, trainable: Iterable[tuple[Group, Tensor]]) -> Work:
        """Returns what the update needs; afterwards noise and averages are used up.

        Raises:
            FinetuneError: a gradient without noise, or a sparse one.
        """
        work: Work = []
        for group, parameter in trainable:
            if self.samples > 1:
                if parameter not in self._sums or not self._follow(group, parameter):
                    continue
                gradient = local_gradient(parameter, self._sums[parameter])
                estimate = self._products[parameter]
            else:
                if parameter.grad is None:
                    continue
                if parameter not in self.noise:
                    raise FinetuneError("IVON: a parameter became trainable between the context and the step")
                gradient = local_gradient(parameter, parameter.grad)
                estimate = self.noise.pop(parameter)
                if group["hess_approx"] == "gradsq":
                    estimate = _estimate(group, estimate, gradient)
            if gradient.layout != torch.strided:
                raise FinetuneError("IVON: sparse gradients have no noise * gradient; use a dense embedding")
            work.append((group, parameter, gradient, estimate))
        return work

    def estimate_of(self, group: Mapping[str, Any]) -> Estimate:
        """Returns what the last entries of `gather` are."""
        if group["hess_approx"] == "gradsq":
            return Estimate.CURVATURE
        return Estimate.NOISE if self.samples == 1 else Estimate.PRODUCT

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


def _estimate(group: Mapping[str, Any], z: Tensor, gradient: Tensor) -> Tensor:
    """Noise times gradient, or the curvature estimate of `gradsq`; overwrites the noise."""
    if group["hess_approx"] == "gradsq":
        return z.copy_(gradient).square_().mul_(group["batch_size"])
    return z.mul_(gradient)


def _norm(tensor: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(local(tensor), dtype=torch.float32)
    return norm
