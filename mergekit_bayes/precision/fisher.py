"""The diagonal Fisher information from per-example gradients.

The Fisher information of a model that predicts labels y from inputs x is

    F = sum_n E_{y ~ p(y | x_n, theta)} [ grad log p(y | x_n, theta) grad log p(y | x_n, theta)^T ]

(Martens 2020, arXiv 1412.1193; as merging weights: Matena & Raffel 2022, arXiv 2111.09832). Two shortcuts are
common and wrong: squaring the gradient of a batch, which mixes examples, and taking y from the data, which is
the empirical Fisher, a different quantity (Kunstner et al. 2019, arXiv 1905.12558). Here gradients are taken
one example at a time and labels are drawn from the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch.func import grad, vmap
from torch.nn.functional import cross_entropy

from mergekit_bayes.errors import NonFiniteError

Tensors = Mapping[str, torch.Tensor]

Predict = Callable[[Tensors, Tensors, Tensors], tuple[torch.Tensor, torch.Tensor]]
"""(params, buffers, row) to logits (positions, classes) and mask (positions,): 1 where a label is predicted"""


@dataclass(frozen=True)
class FisherSum:
    """A Fisher diagonal summed over data.

    Attributes:
        squares: For every parameter name, the sum over examples of squared gradients of the example's summed
            loss; shape of the parameter, unit 1 / parameter squared, float32 or wider. Divide by `num_tokens`
            for the Fisher of an average token.
        num_examples: Rows seen.
        num_tokens: Labels drawn, that is the sum of all masks.
    """

    squares: dict[str, torch.Tensor]
    num_examples: int
    num_tokens: int


def diagonal_fisher(
    predict: Predict,
    params: Tensors,
    buffers: Tensors,
    batches: Iterable[Tensors],
    *,
    generator: torch.Generator,
    chunk_size: int = 8,
) -> FisherSum:
    r"""Sum over examples of squared per-example gradients, with labels sampled from the model.

    For one row with positions t the gradient of the summed loss is g = sum_t g_t, and g_t has mean zero given
    the row's inputs. Labels of different positions are drawn independently given those inputs, so cross terms
    vanish and E[g^2] = sum_t E[g_t^2]: each row's square is an unbiased estimate of the Fisher summed over
    its tokens. With labels from the data the cross terms do not vanish and this would not hold.

    Args:
        predict: The model as a function of one row (no batch dimension).
        params: Parameters to differentiate, by name; anything else the model needs goes into `buffers`.
        buffers: Tensors held fixed, passed on to `predict`.
        batches: Mappings of names to tensors whose first dimension counts rows.
        generator: Source of the sampled labels, on the device of the logits.
        chunk_size: Rows differentiated at once; peak memory grows by one copy of `params` per row.

    Returns:
        The sums and the counts they were taken over.

    Raises:
        ValueError: `chunk_size` is not positive, the tensors of a batch disagree in rows, or there is no row.
        NonFiniteError: A gradient is NaN or infinite.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    squares = {name: torch.zeros_like(value, dtype=_sum_dtype(value)) for name, value in params.items()}
    num_examples = num_tokens = 0
    for rows in _chunks(batches, chunk_size):
        gradients, mask = _sampled_gradients(predict, params, buffers, rows, generator=generator)
        for name, gradient in gradients.items():
            squares[name] += gradient.to(squares[name].dtype).square().sum(0)
        num_examples += mask.shape[0]
        num_tokens += int(mask.sum())
    if num_examples == 0:
        raise ValueError("no rows to estimate the Fisher information from")
    for name, total in squares.items():
        if not total.isfinite().all():
            raise NonFiniteError(f"the Fisher diagonal of {name!r} is not finite: the model overflows here")
    return FisherSum(squares, num_examples, num_tokens)


def sample_labels(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """One label per position from the softmax of `logits` (..., classes); returns shape (...), int64."""
    probabilities = logits.detach().softmax(-1)
    labels = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
    return labels.view(logits.shape[:-1])


def _sampled_gradients(
    predict: Predict, params: Tensors, buffers: Tensors, rows: Tensors, *, generator: torch.Generator
) -> tuple[Tensors, torch.Tensor]:
    def loss(params: Tensors, row: Tensors, labels: torch.Tensor) -> torch.Tensor:
        logits, mask = predict(params, buffers, row)
        return (cross_entropy(logits, labels, reduction="none") * mask).sum()

    with torch.no_grad():
        logits, mask = vmap(lambda row: predict(params, buffers, row))(rows)
    labels = sample_labels(logits, generator)
    detached = {name: value.detach() for name, value in params.items()}
    gradients: Tensors = vmap(grad(loss), in_dims=(None, 0, 0))(detached, rows, labels)
    return gradients, mask


def _chunks(batches: Iterable[Tensors], chunk_size: int) -> Iterable[Tensors]:
    for batch in batches:
        lengths = {name: len(value) for name, value in batch.items()}
        rows = next(iter(lengths.values()), 0)
        if any(length != rows for length in lengths.values()):
            raise ValueError(f"a batch must have as many rows in every tensor, got {lengths}")
        for start in range(0, rows, chunk_size):
            yield {name: value[start : start + chunk_size] for name, value in batch.items()}


def _sum_dtype(value: torch.Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)
