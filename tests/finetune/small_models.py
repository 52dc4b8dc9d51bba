"""A small classifier with IVON on it: what most tests of the optimizer train."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mergekit_bayes import IVON

OPTIONS: dict[str, Any] = {"lr": 0.05, "ess": 200.0, "hess_init": 0.5, "beta2": 0.99, "weight_decay": 1e-3}


def small_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


def batches(count: int, size: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(size, 5, generator=generator), torch.randint(0, 3, (size,), generator=generator))
        for _ in range(count)
    ]


def loss_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    return nn.functional.cross_entropy(model(x.to(dtype)).float(), y)


def train(model: nn.Module, optimizer: IVON, data: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for x, y in data:
        for _ in range(optimizer.mc_samples):
            with optimizer.sampled_params(train=True):
                loss_of(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()


def snapshot(model: nn.Module, optimizer: IVON) -> list[torch.Tensor]:
    states = [optimizer.state[p] for p in model.parameters()]
    kept = [state[key].clone() for state in states if state for key in ("momentum", "hess")]
    return [p.detach().clone() for p in model.parameters()] + kept


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
