"""The base and its experts: short fine-tuning by AdamW, or by IVON, which leaves a curvature behind."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from evaluation.merging.family import Batch, is_head
from mergekit_bayes.finetune.ivon import IVON, export_precision
from mergekit_bayes.finetune.ivon.export import inflation

Optimizer = Literal["adamw", "ivon"]


@dataclass(frozen=True)
class Schedule:
    """How one model is trained: linear warm-up, then linear decay to zero.

    Attributes:
        steps: of the optimizer.
        rate: learning rate of the encoder.
        head_rate: learning rate of the head.
        warmup: share of the steps.
        clip: largest norm of AdamW's gradient.
    """

    steps: int
    rate: float
    head_rate: float
    warmup: float = 0.1
    clip: float = 1.0

    def factor(self, step: int) -> float:
        """What the rates are multiplied by at a step."""
        warm = max(1, round(self.warmup * self.steps))
        return min((step + 1) / warm, (self.steps - step) / max(1, self.steps - warm))


@dataclass(frozen=True)
class Ivon:
    """IVON's own options; h0 follows from the noise, beta2 from the number of steps.

    Attributes:
        ess: effective sample size.
        noise: standard deviation of every weight at the start of a run.
        left: share that h0 still has in h at the end of it.
        weight_decay: delta.
        clip_radius: bound of every entry of the preconditioned direction.
    """

    ess: float
    noise: float
    left: float = 0.05
    weight_decay: float = 1e-8
    clip_radius: float = math.inf

    @property
    def hess_init(self) -> float:
        return 1 / (self.ess * self.noise**2) - self.weight_decay


@dataclass(frozen=True)
class Trained:
    """A model with what it cost.

    Attributes:
        means: trained tensors by name, in the order of the model.
        curvature: of the mean loss, from IVON; None from AdamW.
        seconds: of CPU time, training steps only.
        diagnosis: of IVON's curvature, empty for AdamW.
    """

    means: dict[str, Tensor]
    curvature: dict[str, Tensor] | None
    seconds: float
    diagnosis: dict[str, float]


def train_adamw(model: nn.Module, feed: Iterator[Batch], schedule: Schedule) -> Trained:
    """Fine-tune the model in place with AdamW."""
    optimizer = torch.optim.AdamW(_groups(model, schedule), weight_decay=0.01, fused=True)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    started = time.process_time()
    model.train()
    for _ in range(schedule.steps):
        model(**next(feed)).loss.backward()
        nn.utils.clip_grad_norm_([value for value in model.parameters() if value.requires_grad], schedule.clip)
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
    return Trained(trained_tensors(model), None, time.process_time() - started, {})


def train_ivon(model: nn.Module, feed: Iterator[Batch], schedule: Schedule, ivon: Ivon, *, seed: int) -> Trained:
    """Fine-tune the model in place with IVON; its curvature is exported without h0's share and inflation."""
    optimizer = IVON(
        _groups(model, schedule),
        lr=schedule.rate,
        ess=ivon.ess,
        hess_init=ivon.hess_init,
        beta2=ivon.left ** (1 / schedule.steps),
        weight_decay=ivon.weight_decay,
        clip_radius=ivon.clip_radius,
        fused=False,
        seed=seed,
    )
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    started, rows = time.process_time(), 0
    model.train()
    for _ in range(schedule.steps):
        batch = next(feed)
        rows += len(batch["labels"])
        with optimizer.sampled_params(train=True):
            model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.step()
    seconds = time.process_time() - started
    return _exported(model, optimizer, rows / schedule.steps, seconds)


def _exported(model: nn.Module, optimizer: IVON, batch: float, seconds: float) -> Trained:
    found = export_precision(optimizer, model.named_parameters(), num_examples=1, debias=True, units_per_step=batch)
    decay = found.metadata["weight_decay"]
    assert isinstance(decay, float)
    curvature = {name: value - decay for name, value in found.precisions.items()}
    entries = sum(value.numel() for value in curvature.values())
    diagnosis = {
        "floored": found.floored / entries,
        "inflation": inflation(optimizer.param_groups[0], units_per_step=batch),
        "moved": _moved(optimizer),
    }
    return Trained(trained_tensors(model), curvature, seconds, diagnosis)


def _moved(optimizer: IVON) -> float:
    """Share of entries whose curvature is not where the decay of h0 alone would have left it, to 10%."""
    moved = entries = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            ratio = state["hess"] / (group["hess_init"] * state["hess_init_share"])
            moved += int(((ratio < 0.9) | (ratio > 1.1)).sum())
            entries += ratio.numel()
    return moved / entries


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what training moves."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def _groups(model: nn.Module, schedule: Schedule) -> list[dict[str, Any]]:
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    return [
        {"params": [value for name, value in named if is_head(name) == head], "lr": rate}
        for head, rate in ((False, schedule.rate), (True, schedule.head_rate))
    ]
