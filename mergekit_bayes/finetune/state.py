"""From a run under way to a checkpoint and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from mergekit_bayes.checkpoint.files import listed
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.finetune.checkpoints import Checkpoint
from mergekit_bayes.finetune.loop import Counters

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["Identity", "capture", "restore"]


@dataclass(frozen=True)
class Identity:
    """What a checkpoint belongs to, beside what its tensors say.

    Attributes:
        recipe: resolved.
        base: fingerprint of the base.
        data: fingerprint of the training rows.
        global_batch: rows of one optimizer step over all processes.
        origin: the checkpoint that the recipe told this run to begin from; None for a run from the start.
        start: of IVON; empty for other optimizers.
    """

    recipe: Mapping[str, Any]
    base: str
    data: str
    global_batch: int
    origin: str | None
    start: Mapping[str, Any]


def capture(
    identity: Identity,
    counters: Counters,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    *,
    log: str,
    meter: Mapping[str, float],
    scaler: Mapping[str, Any] | None,
) -> Checkpoint:
    """Returns the state of a run between two steps; tensors are not copied.

    Args:
        identity: of the run.
        counters: how far it is.
        parameters: trainable ones by name, in the order the optimizer has them.
        optimizer: of these parameters.
        log: text of the log so far.
        meter: what was added since its last row.
        scaler: `state_dict` of the loss scaler, if there is one.
    """
    state = {
        "identity": asdict(identity),
        "counters": asdict(counters),
        "parameters": list(parameters),
        "meter": dict(meter),
        "scaler": None if scaler is None else dict(scaler),
    }
    trainable = {name: parameter.detach() for name, parameter in parameters.items()}
    return Checkpoint(counters.step, trainable, optimizer.state_dict(), log, state)


def restore(checkpoint: Checkpoint, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> Counters:
    """Puts weights and optimizer back, in place, and returns how far the run was.

    Raises:
        CheckpointError: the checkpoint is of other parameters; nothing was changed.
    """
    import torch

    from mergekit_bayes.finetune.ivon.sharding import shard_like

    names: Sequence[str] = checkpoint.state["parameters"]
    _check(names, checkpoint.trainable, parameters)
    optimizer.load_state_dict(_sharded(checkpoint.optimizer, list(parameters.values())))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(shard_like(parameter, checkpoint.trainable[name]))
    return Counters(**checkpoint.state["counters"])


def _sharded(state_dict: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """An optimizer's state with its tensors in the shards of their parameters, where these have some."""
    from mergekit_bayes.finetune.ivon.sharding import shard_like

    state = {}
    for index, entries in state_dict["state"].items():
        parameter = parameters[index]
        state[index] = {
            key: shard_like(parameter, value) if getattr(value, "shape", None) == parameter.shape else value
            for key, value in entries.items()
        }
    return {**state_dict, "state": state}


def _check(names: Sequence[str], saved: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> None:
    missing, unknown = sorted(present.keys() - saved.keys()), sorted(saved.keys() - present.keys())
    if missing or unknown:
        parts = [f"lacks {listed(missing, 5)}"] if missing else []
        parts += [f"holds {listed(unknown, 5)}"] if unknown else []
        raise CheckpointError(f"checkpoint: {' and '.join(parts)}; expected the trainable parameters of this model")
    for name, tensor in saved.items():
        if tensor.shape != present[name].shape:
            seen = f"checkpoint: {name} has shape {tuple(tensor.shape)}"
            raise CheckpointError(f"{seen}; expected {tuple(present[name].shape)}, as in this model")
    if list(names) != list(present):
        raise CheckpointError("checkpoint: its parameters have another order than this model's; expected the same")
