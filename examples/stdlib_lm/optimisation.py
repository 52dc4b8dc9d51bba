"""The training loop of the base."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Schedule:
    """AdamW with linear warm-up and cosine decay to a tenth of `learning_rate`."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float
    window: int = 256
    warmup: int = 50
    seed: int = 0

    def rate(self, step: int) -> float:
        """Learning rate of one step."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def train(
    model: torch.nn.Module,
    streams: Mapping[str, torch.Tensor],
    mix: Mapping[str, float],
    schedule: Schedule,
    *,
    name: str,
) -> None:
    """Minimise the next-token loss in place on windows drawn from `streams` with probabilities `mix`."""
    generator = torch.Generator().manual_seed(schedule.seed)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = _optimizer(trainable, schedule.weight_decay)
    progress = Progress(name, schedule)
    model.train()
    for step in range(schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        windows = draw_windows(streams, mix, schedule, generator)
        loss = next_token_loss(model(input_ids=windows).logits, windows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        progress.report(step + 1, loss.item())


class Progress:
    """Prints the mean loss, the speed and the time left, every `every` steps."""

    def __init__(self, name: str, schedule: Schedule, *, every: int = 50) -> None:
        self._name, self._schedule, self._every = name, schedule, every
        self._start = time.monotonic()
        self._recent: list[float] = []

    def report(self, done: int, loss: float) -> None:
        """Take note of one step."""
        self._recent.append(loss)
        if done % self._every and done != self._schedule.steps:
            return
        seconds = time.monotonic() - self._start
        tokens = done * self._schedule.batch * self._schedule.window
        print(
            f"{self._name}: step {done}/{self._schedule.steps}  loss {statistics.fmean(self._recent):.3f}  "
            f"{tokens / seconds:,.0f} tokens/s  {seconds / done * (self._schedule.steps - done):,.0f} s left",
            flush=True,
        )
        self._recent.clear()


def _optimizer(trainable: list[torch.nn.Parameter], weight_decay: float) -> torch.optim.Optimizer:
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), fused=True)


def draw_windows(
    streams: Mapping[str, torch.Tensor],
    mix: Mapping[str, float],
    schedule: Schedule,
    generator: torch.Generator,
) -> torch.Tensor:
    """A batch of random windows, shape (batch, window)."""
    names = sorted(mix)
    chosen = torch.multinomial(
        torch.tensor([mix[name] for name in names]), schedule.batch, replacement=True, generator=generator
    )
    rows = []
    for index in chosen.tolist():
        stream = streams[names[index]]
        at = int(torch.randint(len(stream) - schedule.window + 1, (), generator=generator))
        rows.append(stream[at : at + schedule.window])
    return torch.stack(rows)


def next_token_loss(logits: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of every token but the first of each window, in nats per token."""
    return cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
