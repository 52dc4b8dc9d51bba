"""Curvature of a small model by curvlinops, an independent implementation, for the tests to compare with.

    pip install --no-deps curvlinops-for-pytorch==3.0.1 einops einconv linear_operator
    pip install --no-deps opt-einsum jaxtyping wadler-lindig
    python -m tests.precision.curvlinops_factors

writes golden/curvlinops.safetensors. Without `--no-deps` it would bring backpack, which brings torchvision, which
neither of them needs for this; that is why it is not among the packages of the tests.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.precision.small_models import TwoLayers, features

GOLDEN = Path(__file__).parent / "golden" / "curvlinops.safetensors"


class Pooled(TwoLayers):
    """A classifier whose first layer sees several tokens of each row."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.tanh(self.first(x)).mean(1))
        return out


def batch() -> tuple[Tensor, Tensor]:
    """Rows of four tokens and their classes."""
    return features(7, 4, 5), torch.tensor([0, 1, 2, 2, 1, 0, 1])


def dense() -> dict[str, Tensor]:
    """The curvature of each weight as a matrix, of the loss summed over rows, with the labels of the data."""
    from curvlinops import EKFACLinearOperator, FisherType, KFACLinearOperator

    kinds: dict[str, Any] = {"kfac": KFACLinearOperator, "ekfac": EKFACLinearOperator}
    found = {}
    for kind, operator in kinds.items():
        model = Pooled()
        matrix = operator(
            model,
            nn.CrossEntropyLoss(reduction="sum"),
            list(model.parameters()),
            [batch()],
            fisher_type=FisherType.EMPIRICAL,
            check_deterministic=False,
        ) @ torch.eye(sum(value.numel() for value in model.parameters()), dtype=torch.float64)
        start = 0
        for name, value in model.named_parameters():
            part = slice(start, start + value.numel())
            found[f"{kind}.{name}"] = matrix[part, part].contiguous()
            start += value.numel()
    return found


if __name__ == "__main__":
    save_file(dense(), GOLDEN)
