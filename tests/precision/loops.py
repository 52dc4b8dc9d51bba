"""What estimators should give, by plain loops over rows and plain autograd: slow, and nothing to get wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_bayes.precision.signals import Signal, row_generator

IGNORED = -100


def text_batch(rows: int, *, tokens: int = 9, vocabulary: int = 48, seed: int = 0) -> dict[str, Tensor]:
    """Rows of different lengths, padded on the right, whose first two tokens are a prompt without a loss."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (rows, tokens), generator=generator)
    mask, labels = torch.ones_like(ids), ids.clone()
    for n in range(rows):
        mask[n, tokens - n % 3 :] = 0
    labels[mask == 0] = IGNORED
    labels[:, :2] = IGNORED
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "row": torch.arange(rows) + 10}


def class_batch(rows: int, *, classes: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """The same with one label for each row."""
    labels = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(seed + 1))
    return {**text_batch(rows, seed=seed), "labels": labels}


def rows_of(batch: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """One batch for each row."""
    return [{name: value[n : n + 1] for name, value in batch.items()} for n in range(len(batch["row"]))]


def logits_and_labels(model: nn.Module, row: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits where a row has a loss, (places, classes), and what they should predict, (places,)."""
    output: Any = model(**{name: value for name, value in row.items() if name not in ("labels", "row")})
    logits: Tensor = getattr(output, "logits", output)
    labels = row["labels"]
    if labels.dim() == 2:
        logits, labels = logits[0, :-1], labels[0, 1:]
    return logits[labels != IGNORED], labels[labels != IGNORED]


def row_gradients(
    model: nn.Module, row: Mapping[str, Tensor], signal: Signal, parameters: Mapping[str, Tensor], *, seed: int
) -> dict[str, Tensor]:
    """The gradient of one row's signal in each parameter; zero where there is none."""
    logits, labels = logits_and_labels(model, row)
    sent = signal(logits.detach(), labels, row_generator(seed, int(row["row"])))
    found = torch.autograd.grad(logits, list(parameters.values()), sent, allow_unused=True)
    pairs = zip(parameters.items(), found, strict=True)
    return {name: torch.zeros_like(value) if gradient is None else gradient for (name, value), gradient in pairs}


def squares(
    model: nn.Module, batch: Mapping[str, Tensor], signal: Signal, parameters: Mapping[str, Tensor], *, seed: int
) -> dict[str, Tensor]:
    """Sum over rows of squared gradients."""
    total = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for row in rows_of(batch):
        for name, gradient in row_gradients(model, row, signal, parameters, seed=seed).items():
            total[name] += gradient.square()
    return total


def exact_fisher(model: nn.Module, batch: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The Fisher information summed over places, as a matrix for each parameter, with every label in turn."""
    sizes = {name: value.numel() for name, value in parameters.items()}
    total = {name: torch.zeros(size, size, dtype=torch.float64) for name, size in sizes.items()}
    for row in rows_of(batch):
        logits, _ = logits_and_labels(model, row)
        for place in logits:
            likelihoods = place.log_softmax(-1)
            for label in likelihoods:
                found = torch.autograd.grad(label, list(parameters.values()), retain_graph=True)
                for name, gradient in zip(parameters, found, strict=True):
                    vector = gradient.flatten()
                    total[name] += label.exp().detach() * torch.outer(vector, vector)
    return total


def layer_vectors(
    model: nn.Module, row: Mapping[str, Tensor], path: str, signal: Signal, *, seed: int
) -> tuple[Tensor, Tensor]:
    """What goes into a module and the gradient of what comes out, for each token of one row, (tokens, features)."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        output.retain_grad()
        seen.extend((arguments[0].detach(), output))

    handle = model.get_submodule(path).register_forward_hook(keep)
    logits, labels = logits_and_labels(model, row)
    handle.remove()
    logits.backward(signal(logits.detach(), labels, row_generator(seed, int(row["row"]))))
    model.zero_grad()
    value, output = seen
    return value.flatten(0, -2), output.grad.flatten(0, -2)
