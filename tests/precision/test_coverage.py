"""Uses of parameters that hooks on layers do not see, and that gradients are right all the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mergekit_bayes.precision.coverage import unseen_parameters
from mergekit_bayes.precision.registry import create
from mergekit_bayes.precision.signals import SIGNALS
from mergekit_bayes.precision.targets import find_targets
from tests.precision.loops import squares
from tests.precision.small_models import features, sequences

ROWS = 5


class Model(nn.Module):
    """A head between features and classes, with something in front of it."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part = part.double()
        self.head = nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.part(x))


class Shift(nn.Module):
    """A parameter of a module with children."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LayerNorm(6)
        self.shift = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.shift


class Attention(nn.Module):
    """Multiplies by the weight of its output layer without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Twice(nn.Module):
    """One layer called twice, and its weight used once more beside that."""

    def __init__(self, *, beside: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.beside = beside

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(torch.tanh(self.layer(x)))
        return out @ self.layer.weight.tanh() if self.beside else out


class Recurrent(nn.Module):
    """A layer that returns several things."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(6, 6, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cells(x)[0]


class Mixed(nn.Module):
    """A layer that sees the tokens of all rows in one matrix, as experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.expert(x.flatten(0, 1)).view_as(x)


class InPlace(nn.Module):
    """Changes what a layer returned, in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).mul_(2).add_(x)


class Positions(nn.Module):
    """An embedding of positions, computed once for all rows and used through one that is looked up for each."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Embedding(8, 6, padding_idx=1)
        self.scale = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale(self.positions(torch.arange(x.shape[1])[None]))


class Scaled(nn.Embedding):
    """An embedding with a forward of its own, as Gemma's."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


class Looked(nn.Module):
    """Looks up an embedding by the sign of features."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, x: Tensor) -> Tensor:
        return self.table((x[..., 0] > 0).long()) + x


@pytest.mark.parametrize(
    ("part", "unseen"),
    [
        (Shift(), ["part.shift"]),
        (Attention(), ["part.attention.in_proj_weight", "part.attention.in_proj_bias"]),
        (Twice(beside=False), []),
        (Twice(beside=True), ["part.layer.weight"]),
        (Recurrent(), [f"part.cells.{kind}_l0" for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]),
        (Mixed(), []),
        (InPlace(), []),
        (Positions(), []),
        (nn.Conv1d(4, 4, 1), []),
        (Looked(Scaled(2, 6)), []),
        (Looked(nn.Embedding(2, 6)), []),
        (nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True)), []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_gradients_are_right_whatever_a_model_does(part: nn.Module, unseen: list[str]) -> None:
    model = Model(part).eval()
    batch = sequences(features(ROWS, 4, 6), classes=3)
    parameters = dict(model.named_parameters())
    row = {"x": batch["x"][:1]}
    found = unseen_parameters(model, row, parameters)
    assert set(unseen) <= set(found)
    assert (not unseen) == (not found)
    estimator = create("fisher", model, find_targets(model, space="full"), seed=0, chunk_size=3)
    counts = estimator.update(batch)
    assert counts.rows == ROWS
    for name, expected in squares(model, batch, SIGNALS["sampled_label"], parameters, seed=0).items():
        torch.testing.assert_close(estimator.sums()[name], expected, rtol=1e-10, atol=1e-20, msg=name)


def test_parameters_that_are_not_used_have_no_curvature() -> None:
    model = Model(nn.Linear(6, 6)).eval()
    model.spare = nn.Linear(2, 2).double()
    batch = sequences(features(ROWS, 4, 6), classes=3)
    estimator = create("fisher", model, find_targets(model, space="full"), seed=0)
    estimator.update(batch)
    assert not estimator.sums()["spare.weight"].any()
    assert estimator.sums()["part.weight"].any()
