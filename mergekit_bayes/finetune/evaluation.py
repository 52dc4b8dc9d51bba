"""Scores of the mean weights on held-out data: exact over processes, since sums are added and not means."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from mergekit_bayes.data import collate, evaluation_batches
from mergekit_bayes.finetune.loss import IGNORED, exact_dtype, forward, summed_loss, targets

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

    from mergekit_bayes.data import Rows

__all__ = ["evaluate"]

BINS = 15
"""Of the confidence, for the expected calibration error."""


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    rows: Rows,
    *,
    pad_token_id: int,
    batch_size: int,
    accelerator: Accelerator,
    flatten: bool = False,
) -> dict[str, float]:
    """Scores a model on some rows; every process takes its share of them.

    Args:
        model: not wrapped for distributed training; its mode is put back afterwards.
        rows: at least one.
        pad_token_id: fills short rows.
        batch_size: rows of one process at a time.
        accelerator: adds the processes' sums.
        flatten: put packed rows behind one another, as flash attention wants them.

    Returns:
        `loss` in nats per unit and, for language models, `perplexity` and `accuracy` of the most probable next token;
        for classification `accuracy` and `ece`, the expected calibration error over 15 bins (Naeini et al., AAAI 2015).
        `units` says how many tokens or examples that is.
    """
    training = model.training
    model.eval()
    try:
        device, exact = accelerator.device, exact_dtype(accelerator.device)
        sums = torch.zeros(3 + 3 * BINS, dtype=exact, device=device)
        for indices in _share(rows, batch_size, accelerator):
            chosen = [rows[index] for index in indices]
            batch = collate(chosen, pad_token_id=pad_token_id, task=rows.task, flatten=flatten)
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            sums += _sums(forward(model, batch), batch["labels"], rows.task)
    finally:
        model.train(training)
    total: Tensor = accelerator.reduce(sums, "sum")
    return _scores(total.tolist(), rows.task)


def _share(rows: Rows, batch_size: int, accelerator: Accelerator) -> Iterator[list[int]]:
    return evaluation_batches(
        rows, batch_size=batch_size, rank=accelerator.process_index, world=accelerator.num_processes
    )


def _sums(logits: Tensor, labels: Tensor, task: str) -> Tensor:
    """Loss, units, right answers; then count, confidence and right answers of every bin."""
    wanted = targets(labels, task).reshape(-1).to(logits.device)
    scored = wanted != IGNORED
    loss = summed_loss(logits, labels, task)
    # the values decide only which is largest, so the dtype of the logits will do; confidence is for few classes
    right = (logits.reshape(wanted.numel(), -1).argmax(-1) == wanted) & scored
    exact = exact_dtype(logits.device)
    head = torch.stack([loss.to(exact), scored.sum().to(exact), right.sum().to(exact)])
    bins = torch.zeros(3, BINS, dtype=exact, device=logits.device)
    if task != "causal_lm":
        confidence = torch.softmax(logits.float(), dim=-1).max(-1).values
        place = (confidence * BINS).long().clamp(max=BINS - 1)
        for row, values in zip(bins, (scored, confidence * scored, right), strict=True):
            row.index_add_(0, place, values.to(exact))
    return torch.cat([head, bins.view(-1)])


def _scores(sums: list[float], task: str) -> dict[str, float]:
    loss, units, right = sums[:3]
    mean, accuracy = loss / units, right / units
    if task == "causal_lm":
        return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "accuracy": accuracy, "units": units}
    _, confidence, correct = (sums[3 + part * BINS :][:BINS] for part in range(3))
    ece = sum(abs(sure - hit) for sure, hit in zip(confidence, correct, strict=True)) / units
    return {"loss": mean, "accuracy": accuracy, "ece": ece, "units": units}
