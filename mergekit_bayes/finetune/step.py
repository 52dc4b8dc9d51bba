"""One optimizer step: micro-batches, samples of the weights, processes, clipping, loss scaling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mergekit_bayes.finetune.ivon import IVON
from mergekit_bayes.finetune.ivon.sharding import is_sharded, local, whole
from mergekit_bayes.finetune.loss import exact_dtype, forward, summed_loss

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

__all__ = ["Batch", "StepResult", "Stepper"]

Batch = Mapping[str, "Tensor"]


@dataclass(frozen=True)
class StepResult:
    """What one step did.

    Attributes:
        loss: summed over the units of this process, averaged over the samples of the weights; on the device.
        grad_norm: of the mean loss, before clipping; on the device. This process's own where each draws its own noise.
        skipped: the gradient was not finite, and nothing was changed.
    """

    loss: Tensor
    grad_norm: Tensor
    skipped: bool


class Stepper:
    """Takes optimizer steps whose gradient is that of the mean loss over all units of the global batch.

    The mean is formed over the units of the whole step, not over those of a micro-batch or process: neither the number
    of micro-batches nor that of processes changes the gradient. One sample of the weights (of each of `mc_samples`) is
    held over all micro-batches, so that the curvature does not depend on how a batch is cut either.

    Args:
        accelerator: for precision and processes.
        model: as prepared by it.
        optimizer: IVON or any other; not prepared by the accelerator, which would hide the sampling.
        task: `causal_lm` or `sequence_classification`.
        max_grad_norm: the gradient is scaled down to this norm; 0 for no clipping.
        scaler: of the loss in float16.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        task: str,
        max_grad_norm: float,
        scaler: Any = None,
    ) -> None:
        self._accelerator = accelerator
        self._model = model
        self._optimizer = optimizer
        self._task = task
        self._max_grad_norm = max_grad_norm
        self._scaler = scaler
        self._ivon = optimizer if isinstance(optimizer, IVON) else None
        self._local = self._ivon is not None and self._ivon.noise == "per_process"
        self._trainable = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        self._sharded = any(is_sharded(parameter) for parameter in self._trainable)

    def step(self, micro_batches: Sequence[Batch], *, units: int, lr: float) -> StepResult:
        """Takes one step.

        Args:
            micro_batches: those of this process, at least one.
            units: of the whole step, over all micro-batches and processes.
            lr: learning rate.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        samples = 1 if self._ivon is None else self._ivon.mc_samples
        # DDP and FSDP average over processes what has to be summed; so does IVON where each draws its own noise
        factor = self._accelerator.num_processes / max(units, 1)
        device = self._accelerator.device
        loss = torch.zeros((), dtype=exact_dtype(device), device=device)
        for _ in range(samples):
            with self._sampled():
                loss += self._backward(micro_batches, factor) / samples
        norm, skipped = self._update()
        self._optimizer.zero_grad()
        return StepResult(loss, norm, skipped)

    def _sampled(self) -> AbstractContextManager[None]:
        return nullcontext() if self._ivon is None else self._ivon.sampled_params(train=True)

    def _backward(self, micro_batches: Sequence[Batch], factor: float) -> Tensor:
        total: Tensor | float = 0.0
        for number, batch in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            # in shards every micro-batch is added up at once: whole gradients might not fit
            keep_local = not self._sharded and (self._local or not last)
            with self._accelerator.no_sync(self._model) if keep_local else nullcontext():
                moved = {name: tensor.to(self._accelerator.device, non_blocking=True) for name, tensor in batch.items()}
                loss = summed_loss(forward(self._model, moved), moved["labels"], self._task)
                scaled = loss * factor
                (scaled if self._scaler is None else self._scaler.scale(scaled)).backward()
            total = total + loss.detach()
        assert isinstance(total, torch.Tensor)  # there is at least one micro-batch
        return total

    def _update(self) -> tuple[Tensor, bool]:
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        gradients = [p.grad for p in self._trainable if p.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients)
        norm = whole(total)
        finite = bool(torch.isfinite(norm))
        if finite and self._max_grad_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self._trainable, self._max_grad_norm, total)
        if self._ivon is None:
            if finite:
                self._optimizer.step()
        else:
            finite = self._ivon_step(self._ivon, gradients, finite=finite)
        if self._scaler is not None:
            self._scaler.update()
        return norm, not finite

    @staticmethod
    def _ivon_step(optimizer: IVON, gradients: Sequence[Tensor], *, finite: bool) -> bool:
        """Whether the step was taken; with a noise of their own, processes agree on it inside `step`."""
        before = optimizer.param_groups[0]["skipped"]
        if not finite and gradients:
            # a norm that overflowed says no less than an entry that did: let the optimizer see one
            first = next((part for part in map(local, gradients) if part.numel()), None)
            if first is not None:
                first.view(-1)[0] = float("nan")
        optimizer.step()
        return bool(optimizer.param_groups[0]["skipped"] == before)
