"""Whether a model keeps the segments of a packed row apart.

Not every architecture does: recurrent layers carry their state across, attention with its own masks may overlook
where positions start over, and flash attention looks for packed rows in batches of one row only. So it is tried.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_bayes.data.collate import collate
from mergekit_bayes.data.rows import Row

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

_LENGTHS = (5, 7, 3)


def packing_fault(model: Module, *, vocabulary: int, flatten: bool = False) -> str | None:
    """Why packed rows would give a model another loss than the rows on their own; None if they do not.

    Runs the model on a few tokens: packed, packed behind other tokens, each segment on its own, and all as one row.
    How much the last segment changes when it sees the others is what tells a fault from rounding.

    Args:
        model: a causal language model of transformers, where it will be trained. Its mode and its gradients are left
            as they are.
        vocabulary: number of token ids it knows.
        flatten: as in `collate`.

    Returns:
        The reason, as it may stand in a message; None if packing is exact.
    """
    import torch

    segments = [_segment(length, index, vocabulary) for index, length in enumerate(_LENGTHS)]
    others = [_segment(length, index + 50, vocabulary) for index, length in enumerate(_LENGTHS)]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            packed = _logits(model, [_packed(segments), _packed(others)], flatten=flatten)
            behind = _logits(model, [_packed([*others[:2], segments[2]]), _packed(others)], flatten=flatten)
            alone = [_logits(model, [segment, segment], flatten=False)[0] for segment in segments]
            joined = _logits(model, [_joined(segments), _joined(others)], flatten=False)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        return f"it does not take `position_ids` without an attention mask ({type(error).__name__}: {reason})"
    finally:
        for module, training in modes:
            module.training = training
    whole = slice(0, sum(_LENGTHS))
    return _compare(packed[0, whole], behind[0, whole], torch.cat(alone), joined[0, whole])


def _compare(packed: Tensor, behind: Tensor, alone: Tensor, joined: Tensor) -> str | None:
    last = slice(-_LENGTHS[-1], None)
    effect = float((joined[last] - alone[last]).abs().max())
    leak = float((packed[last] - behind[last]).abs().max())
    if not leak <= effect / 16:
        return f"segments of a packed row see each other (a logit moves by {leak:.2g})"
    moved = float((packed - alone).abs().max())
    if not moved <= effect / 4:
        return f"segments of a packed row differ from the rows on their own (a logit moves by {moved:.2g})"
    return None


def _logits(model: Module, rows: list[Row], *, flatten: bool) -> Tensor:
    batch = collate(rows, pad_token_id=0, task="causal_lm", flatten=flatten)
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def _segment(length: int, index: int, vocabulary: int) -> Row:
    tokens = [(7 * index + 3 * position) % vocabulary for position in range(length)]
    return Row(input_ids=tokens, labels=tokens, segments=[length])


def _packed(segments: list[Row]) -> Row:
    joined = _joined(segments)
    return Row(**joined, segments=[len(segment["input_ids"]) for segment in segments])


def _joined(segments: list[Row]) -> Row:
    tokens = [token for segment in segments for token in segment["input_ids"]]
    return Row(input_ids=tokens, labels=tokens)
