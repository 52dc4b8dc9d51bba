"""What Adam left behind: the averages of squared gradients, and which parameter each of them belongs to.

Two trainers' files are read: a checkpoint of this library's, whose averages have names, and `optimizer.pt` of the
Hugging Face Trainer, whose averages have numbers. The Trainer numbers the parameters that are decayed first and the
others after them; which those are follows from its own rule and is held against the shapes of the averages.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_bayes.checkpoint.files import listed, read_json, shown
from mergekit_bayes.checkpoint.tensors import read_tensors
from mergekit_bayes.errors import CheckpointError

__all__ = ["AdamState", "read_adam_state"]

_MARKER, _OURS, _TRAINERS = "checkpoint.json", "optimizer.safetensors", "optimizer.pt"
_AVERAGE = "exp_avg_sq"


@dataclass(frozen=True)
class AdamState:
    """Averages of squared gradients.

    Attributes:
        averages: by the name of the parameter in memory.
        step: how many steps were averaged.
        beta2: decay of the average.
    """

    averages: Mapping[str, Tensor]
    step: int
    beta2: float


def read_adam_state(path: Path, model: nn.Module, names: Mapping[str, str]) -> AdamState:
    """Reads the state of Adam or AdamW.

    Args:
        path: a checkpoint folder of either trainer, or its file.
        model: with what was trained requiring gradients.
        names: the name on disk of each of these parameters, by its name in memory.

    Raises:
        CheckpointError: it is not there, cannot be read without running code, is of another optimizer or model, or does
            not say which parameter an average belongs to.
    """
    parameters = {name: p for name, p in model.named_parameters() if name in names}
    folder = path if path.is_dir() else path.parent
    if path.name != _TRAINERS and (folder / _MARKER).is_file():
        return _ours(folder, parameters, names)
    file = path / _TRAINERS if path.is_dir() else path
    if not file.is_file():
        expected = f"expected {_TRAINERS}, or a checkpoint with {_MARKER} and {_OURS}"
        raise CheckpointError(f"{shown(path)}: holds no state of an optimizer; {expected}")
    return _trainers(file, model, parameters)


def _ours(folder: Path, parameters: Mapping[str, nn.Parameter], names: Mapping[str, str]) -> AdamState:
    content: Any = read_json(folder / _MARKER)
    try:
        order = [str(name) for name in content["state"]["parameters"]]
        groups = content["optimizer"]["param_groups"]
        betas = {tuple(group["betas"]) for group in groups}
    except (KeyError, TypeError) as error:
        where = f"{shown(folder / _MARKER)}: has no `{error.args[0]}`"
        raise CheckpointError(f"{where}; expected the checkpoint of a training with AdamW") from error
    tensors = read_tensors(folder / _OURS)
    by_disk = {disk: name for name, disk in names.items()}
    found = {by_disk.get(name): tensors.get(f"{place}.{_AVERAGE}") for place, name in enumerate(order)}
    steps = {float(tensor) for name, tensor in tensors.items() if name.endswith(".step")}
    steps |= {float(entry["step"]) for entry in content["optimizer"]["state"].values() if "step" in entry}
    averages = {name: tensor for name, tensor in found.items() if name is not None and tensor is not None}
    return _state(folder, averages, parameters, steps=steps, betas=betas)


def _trainers(file: Path, model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> AdamState:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
        groups, state = content["param_groups"], content["state"]
        betas = {tuple(group["betas"]) for group in groups}
        averages = {int(key): entry[_AVERAGE] for key, entry in state.items()}
        steps = {float(entry["step"]) for entry in state.values()}
    except OSError as error:
        raise CheckpointError(f"{shown(file)}: cannot be read: {error.strerror}") from error
    except Exception as error:  # pickles fail in every way there is
        seen = f"{shown(file)}: cannot be read as the state of Adam: {type(error).__name__}: {_first_line(error)}"
        raise CheckpointError(f"{seen}; expected `optimizer.pt` of a training with AdamW") from error
    numbers = [int(number) for group in groups for number in group["params"]]
    orders = _orders(model, parameters, [len(group["params"]) for group in groups], groups)
    named = [dict(zip(order, numbers, strict=True)) for order in orders if len(order) == len(numbers)]
    fitting = [order for order in named if _fits(order, averages, parameters)]
    if not fitting or any(order != fitting[0] for order in fitting):
        seen = f"{shown(file)}: {len(averages)} averages in groups of {listed([str(len(g['params'])) for g in groups])}"
        why = "cannot tell which parameter each belongs to" if fitting else "of other shapes than"
        raise CheckpointError(
            f"{seen}, {why}{'' if fitting else f' the {len(parameters)} trained parameters in any known order'}; "
            "expected the optimizer of this very model and adapter"
        )
    return _state(
        file,
        {name: averages[number] for name, number in fitting[0].items() if number in averages},
        parameters,
        steps=steps,
        betas=betas,
    )


def _orders(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], sizes: Sequence[int], groups: Sequence[Mapping[str, Any]]
) -> list[list[str]]:
    """Orders in which a trainer may have numbered the parameters."""
    if all("param_names" in group for group in groups):
        return [[str(name) for group in groups for name in group["param_names"]]]
    plain = list(parameters)
    if len(sizes) == 1:
        return [plain]
    decayed = _decayed(model)
    split = [[name for name in plain if name in decayed], [name for name in plain if name not in decayed]]
    return [split[0] + split[1]] if [len(part) for part in split] == list(sizes) else []


def _decayed(model: nn.Module) -> set[str]:
    """Names of the parameters that the Trainer decays: all but biases and the weights of normalisations."""
    from transformers import Trainer

    found: Any = Trainer.get_decay_parameter_names(None, model)  # it does not look at itself
    return set(found)


def _fits(order: Mapping[str, int], averages: Mapping[int, Tensor], parameters: Mapping[str, nn.Parameter]) -> bool:
    if order.keys() != parameters.keys():
        return False
    return all(number not in averages or averages[number].shape == parameters[n].shape for n, number in order.items())


def _state(
    where: Path,
    averages: Mapping[str, Tensor],
    parameters: Mapping[str, nn.Parameter],
    *,
    steps: set[float],
    betas: set[tuple[float, ...]],
) -> AdamState:
    missing = sorted(parameters.keys() - averages.keys())
    if missing:
        raise CheckpointError(
            f"{shown(where)}: holds no averages of {listed(missing, 5)}; expected those of every trained parameter"
        )
    for name, average in averages.items():
        if average.shape != parameters[name].shape:
            seen = f"{shown(where)}: the average of {shown(name)} has shape {tuple(average.shape)}"
            raise CheckpointError(f"{seen}; expected {tuple(parameters[name].shape)}, that of the parameter")
    if len(steps) != 1 or len(betas) != 1:
        seen = f"{shown(where)}: parameters have taken {sorted(steps)} steps with betas {sorted(betas)}"
        raise CheckpointError(f"{seen}; expected the same for all")
    (step,), ((_, beta2),) = steps, betas
    return AdamState({name: averages[name] for name in sorted(averages)}, int(step), float(beta2))


def _first_line(error: Exception) -> str:
    return re.split(r"[\n.]", str(error).strip(), maxsplit=1)[0][:120]
