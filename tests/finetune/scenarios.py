"""What one process and two processes train, so that they can be compared: models, batches, loops."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_bayes import IVON
from tests.tiny_models import tiny_model

OPTIONS: dict[str, Any] = {"lr": 0.05, "ess": 200.0, "hess_init": 0.5, "beta2": 0.95, "weight_decay": 1e-3}
ROWS = 8
"""Rows of a batch; a process of two takes half of them."""

Loss = Callable[[nn.Module, int, slice], Tensor]
"""Loss of a model on some rows of the batch of a step."""


def network(*widths: int) -> nn.Sequential:
    """Layers of given widths: 5 and 3 outputs cannot be dealt evenly to two processes."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for into, out in zip((4, *widths), (*widths, 2), strict=True):
        layers += [nn.Linear(into, out), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def network_loss(model: nn.Module, step: int, rows: slice) -> Tensor:
    """Mean squared error on random rows."""
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(ROWS, 4, generator=generator), torch.randn(ROWS, 2, generator=generator)
    return ((model(x[rows]) - y[rows]) ** 2).mean()


def llama(*, adapter: bool) -> nn.Module:
    """A tiny Llama to be trained whole, or through an adapter whose second factor is not zero."""
    model = tiny_model("llama")
    if not adapter:
        return model.train()
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, config).train()


def llama_loss(model: nn.Module, step: int, rows: slice) -> Tensor:
    """Mean loss over the tokens of random rows of equal length."""
    ids = torch.randint(0, 48, (ROWS, 12), generator=torch.Generator().manual_seed(step))[rows]
    return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]


def train(
    model: nn.Module,
    optimizer: IVON,
    loss: Loss,
    *,
    steps: range = range(4),
    rows: slice = slice(None),
    clip: float = 0.5,
    spoil: int | None = None,
) -> list[float]:
    """Train, with a forward pass at the mean before every step; returns those losses.

    Args:
        model: wrapped or not.
        optimizer: its own.
        loss: of the model.
        steps: numbers of the steps, which name the batches.
        rows: of every batch.
        clip: norm the gradient is scaled down to.
        spoil: in this step, one entry of a gradient becomes NaN.
    """
    at_mean = []
    for step in steps:
        with torch.no_grad():
            at_mean.append(float(loss(model, step, rows)))
        for _ in range(optimizer.mc_samples):
            with optimizer.sampled_params(train=True):
                loss(model, step, rows).backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
        with nullcontext() if step != spoil else torch.no_grad():
            if step == spoil:
                gradient: Any = next(p.grad for p in model.parameters() if p.grad is not None)
                part = gradient.to_local() if hasattr(gradient, "to_local") else gradient
                part.view(-1)[0] = float("nan")
        optimizer.step()
        optimizer.zero_grad()
    return at_mean


def whole(tensor: Any) -> Tensor:
    """A tensor, gathered if it is sharded."""
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[no-any-return]


def state_of(model: nn.Module, optimizer: IVON) -> list[Tensor]:
    """Mean, momentum and curvature of every trained parameter, whole."""
    found = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            state = optimizer.state[parameter]
            found += [whole(parameter).clone(), whole(state["momentum"]).clone(), whole(state["hess"]).clone()]
    return found
