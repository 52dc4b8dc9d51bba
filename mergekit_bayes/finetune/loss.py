"""The loss, summed: a mean is formed once per optimizer step, over the units of all micro-batches and processes.

A unit is a predicted token (causal LM) or an example (classification).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import cross_entropy, pad

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["IGNORED", "exact_dtype", "forward", "summed_loss", "targets"]

IGNORED = -100
"""Label of a token that is not to be predicted."""


def exact_dtype(device: torch.device) -> torch.dtype:
    """Returns what sums over many batches are kept in: float64, where a device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def forward(model: torch.nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Returns the logits of a batch; its labels are kept from the model, whose own loss is a mean over the batch."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits: Tensor = model(**inputs).logits
    return logits


def targets(labels: Tensor, task: str) -> Tensor:
    """Returns what the logits at each place predict: the next token, or the label itself."""
    return pad(labels[:, 1:], (0, 1), value=IGNORED) if task == "causal_lm" else labels


def summed_loss(logits: Tensor, labels: Tensor, task: str) -> Tensor:
    """Returns the cross-entropy in nats, summed over the units of a batch, in float32.

    Args:
        logits: shape (rows, tokens, vocabulary) or (rows, classes).
        labels: as the data has them: tokens of the row with IGNORED where there is no loss, or one class per row.
        task: `causal_lm` or `sequence_classification`.
    """
    # the labels move, not the logits: a shifted view of the logits would be copied before it is flattened
    wanted = targets(labels, task).reshape(-1).to(logits.device)
    return cross_entropy(logits.reshape(wanted.numel(), -1).float(), wanted, ignore_index=IGNORED, reduction="sum")
