"""What happens between two rows of the log: mean loss, speed, remaining time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from mergekit_bayes.finetune.loss import exact_dtype

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mergekit_bayes.finetune.feed import StepData
    from mergekit_bayes.finetune.step import StepResult

__all__ = ["Meter"]


class Meter:
    """Adds up steps without waiting for the accelerator; only `read` and `pending` do.

    Args:
        accelerator: adds the processes' sums.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._reset()

    def _reset(self) -> None:
        self._began = time.monotonic()
        self._loss: torch.Tensor | None = None
        self._norm: torch.Tensor | None = None
        self._units = self._tokens = self._steps = self._skipped = 0

    def add(self, result: StepResult, data: StepData) -> None:
        """Takes note of one step; a skipped one counts for the speed only."""
        self._steps += 1
        self._tokens += data.tokens
        if result.skipped:
            self._skipped += 1
            return
        self._units += data.units
        self._loss = result.loss if self._loss is None else self._loss + result.loss
        self._norm = result.grad_norm

    def pause(self, seconds: float) -> None:
        """Leaves time out of the speed that was spent on something else."""
        self._began += seconds

    def pending(self) -> dict[str, float]:
        """Returns what was added since the last reading, over all processes, for a checkpoint.

        Every process must call this at the same step.
        """
        loss, tokens = self._sums()
        return {
            "loss": loss,
            "tokens": tokens,
            "units": self._units,
            "steps": self._steps,
            "skipped": self._skipped,
            "seconds": time.monotonic() - self._began,
        }

    def take_up(self, pending: Mapping[str, float]) -> None:
        """Goes on from what `pending` returned when the checkpoint was written, in any number of processes."""
        self._reset()
        self._units, self._steps = int(pending["units"]), int(pending["steps"])
        self._skipped = int(pending["skipped"])
        self._began -= pending["seconds"]
        if self._accelerator.is_main_process:  # the sums of all are added again
            device = self._accelerator.device
            self._tokens = int(pending["tokens"])
            self._loss = torch.tensor(pending["loss"], dtype=exact_dtype(device), device=device)

    def read(self, *, steps_left: int) -> tuple[dict[str, float], int, float]:
        """Returns a row of values, tokens seen by all processes and seconds, all since the last reading.

        Every process must call this at the same step.

        Args:
            steps_left: of the run.
        """
        seconds = max(time.monotonic() - self._began, 1e-9)
        loss, tokens = self._sums()
        row: dict[str, float] = {"skipped": self._skipped} if self._skipped else {}
        if self._units:
            row["loss"] = loss / self._units
        if self._norm is not None:
            row["grad_norm"] = float(self._norm)
        row["tokens_per_second"] = tokens / seconds
        row["seconds_left"] = seconds / max(self._steps, 1) * steps_left
        self._reset()
        return row, tokens, seconds

    def _sums(self) -> tuple[float, int]:
        """Loss and tokens of all processes."""
        device = self._accelerator.device
        own = torch.tensor([0.0, self._tokens], dtype=exact_dtype(device), device=device)
        if self._loss is not None:
            own[0] = self._loss
        loss, tokens = self._accelerator.reduce(own, "sum").tolist()
        return loss, int(tokens)
