r"""What is sent backwards through a model in place of the gradient of a loss.

At one place a model predicts a class with probabilities p = softmax(z) of its logits z. For a label y the gradient of
-log p_y is p - e_y. The curvature wanted is that of the loss in the logits, diag(p) - p p^T, carried back through the
model's Jacobian J:

    F = sum J^T (diag(p) - p p^T) J = E[sum J^T v v^T J]     for any v with E[v] = 0, E[v v^T] = diag(p) - p p^T

so every such v, independent at every place, gives an unbiased estimate from one pass backwards. Two are here:

    sampled_label     v = p - e_y, y ~ p: the Fisher information by its definition (Martens 2020, arXiv 1412.1193)
    random_vector     v = sqrt(p) z - p (sqrt(p) . z), z independent random signs: the Gauss-Newton matrix as
                      J^T B z with B B^T = diag(p) - p p^T, B = diag(sqrt(p)) - p sqrt(p)^T

For cross-entropy both matrices are the same and so are the expectations; the variances are not. A confident model
rarely draws an unlikely label, and when it does the square is large: with two classes, one of probability p << 1, the
square of v has a relative variance of 1 / p with labels and at most 4 p with signs.

    data_label        v = p - e_y, y of the data, with E[v] != 0: gives the empirical Fisher, another quantity
                      (Kunstner et al. 2019, arXiv 1905.12558)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import blake2b
from struct import pack
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

__all__ = ["SIGNALS", "Signal", "SignalName", "data_label", "random_vector", "row_generator", "sampled_label"]

Signal = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""(logits, labels, generator) to v; logits and v of shape (places, classes), float32 or wider, labels (places,)"""

SignalName = Literal["sampled_label", "data_label", "random_vector"]


def row_generator(seed: int, number: int) -> torch.Generator:
    """Returns the source of what is drawn for one row, on the CPU: the same wherever and beside whatever it is seen."""
    digest = blake2b(pack("<2q", seed, number), digest_size=8, person=b"precision").digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def sampled_label(logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Returns p - e_y with y drawn from p."""
    probabilities = logits.softmax(-1)
    return probabilities - one_hot(draw_labels(probabilities, generator), logits.shape[-1]).to(logits.dtype)


def data_label(logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Returns p - e_y with y from the data."""
    return logits.softmax(-1) - one_hot(labels, logits.shape[-1]).to(logits.dtype)


def random_vector(logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Returns B z for random signs z, where B B^T is the Hessian of the loss in the logits."""
    root = logits.softmax(-1).sqrt()
    spread = root * _random_signs(logits, generator)
    return spread - root.square() * spread.sum(-1, keepdim=True)


def draw_labels(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """Draws one class at each place by inverting the cumulated probabilities; (places,) int64."""
    cumulated = probabilities.cumsum(-1)
    total = cumulated[:, -1:]
    uniform = torch.rand(len(probabilities), 1, generator=generator, dtype=torch.float64).to(probabilities.device)
    # rounding must not push a draw beyond the last class that has any probability
    height = torch.minimum(uniform.to(total.dtype) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulated, height, right=True).squeeze(-1)


SIGNALS: Mapping[SignalName, Signal] = MappingProxyType(
    {"sampled_label": sampled_label, "data_label": data_label, "random_vector": random_vector}
)


def _random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Signs of the shape and dtype of a matrix, 62 to a random number: vocabularies are large."""
    places, classes = like.shape
    bits = torch.randint(0, 2**62, (places, -(-classes // 62), 1), generator=generator).to(like.device)
    signs = (bits >> torch.arange(62, device=like.device)) & 1
    return (signs.view(places, -1)[:, :classes] * 2 - 1).to(like.dtype)
