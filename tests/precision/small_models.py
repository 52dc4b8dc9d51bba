"""Models for tests of estimators, in float64 so that a sum in another order is the same sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.tiny_models import tiny_model, uniform


def whole(name: str) -> Any:
    """A tiny model of transformers."""
    return tiny_model(name).double()


def adapted(name: str, targets: list[str], **lora: Any) -> Any:
    """The same with an adapter whose factors are not zero."""
    import peft

    model = peft.get_peft_model(tiny_model(name), peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **lora))
    with torch.no_grad():
        for tensor_name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(uniform(tensor_name, tuple(parameter.shape), seed=1, half_width=0.125))
    return model.double().eval()


class Softmax(nn.Module):
    """A linear softmax model of each token on its own."""

    def __init__(self, features: int = 3, classes: int = 4) -> None:
        super().__init__()
        self.head = nn.Linear(features, classes, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.head.weight.copy_(uniform("softmax", (classes, features), seed=2, half_width=1.0))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(x)
        return out


class TwoLayers(nn.Module):
    """Two linear layers with tokens that see those before them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 4, bias=False, dtype=torch.float64)
        self.second = nn.Linear(4, 3, bias=False, dtype=torch.float64)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(uniform(name, tuple(parameter.shape), seed=3, half_width=0.5))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)).cumsum(-2))
        return out


class Rooted(TwoLayers):
    """The same with a root between, which has no slope at zero."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).abs().sqrt())
        return out


def features(*shape: int, seed: int = 5) -> Tensor:
    """Inputs of the models above."""
    return uniform("features", shape, seed=seed, half_width=1.0).double()


def classified(x: Tensor, *, classes: int, seed: int = 6) -> dict[str, Tensor]:
    """A batch of rows (rows, features) with a label each."""
    labels = torch.randint(0, classes, (len(x),), generator=torch.Generator().manual_seed(seed))
    return {"x": x, "labels": labels, "row": torch.arange(len(x))}


def sequences(x: Tensor, *, classes: int, seed: int = 6) -> dict[str, Tensor]:
    """A batch of rows (rows, tokens, features) where every token but the last predicts a class."""
    labels = torch.randint(0, classes, x.shape[:2], generator=torch.Generator().manual_seed(seed))
    return {"x": x, "labels": labels, "row": torch.arange(len(x))}
