"""Plain modules with precisions, small enough to know what must come out."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class OneWeight(nn.Module):
    """Logits (0, w x) of two classes: p(1 | x) = sigmoid(w x)."""

    def __init__(self, mean: float, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([mean], dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(x), self.w * x], dim=-1)


class NextToken(nn.Module):
    """A bigram model: logits of the next token are a row of a table, here (rows, positions, vocabulary)."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.table = nn.Parameter(torch.randn(vocabulary, vocabulary, generator=generator))

    def forward(self, ids: Tensor) -> Tensor:
        return self.table[ids]


def classifier(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Three classes from five numbers, with dropout and running averages, in training mode."""
    torch.manual_seed(0)
    layers = (nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))
    return nn.Sequential(*layers).to(dtype)


def precisions_of(model: nn.Module, *, seed: int = 1) -> dict[str, Tensor]:
    """Log-normal precisions of all parameters, some ten on average."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 10 * torch.randn(parameter.shape, generator=generator).exp()
        for name, parameter in model.named_parameters()
    }


def weights_in(model: nn.Module) -> dict[str, Tensor]:
    """A copy of every parameter and buffer."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(
        torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8))
        if tensor.dim()
        else torch.equal(tensor, second[name])
        for name, tensor in first.items()
    )
