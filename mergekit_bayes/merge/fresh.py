"""Tensors that the base lacks and sources bring along, such as a classification head, and what they started from.

The task vector of a new head is what training added to its start. The start takes the base's place, so it has to be
the same in every source; training with one seed makes it so, and leaves it in a file beside the result.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence

from mergekit_bayes.checkpoint.files import listed, open_regular, read_exactly
from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.checkpoint.initial import FRESH_NAME
from mergekit_bayes.errors import CheckpointError, MissingInputError, ShapeMismatchError
from mergekit_bayes.merge.setting import Setting

Holders = Mapping[str, TensorInfo]
"""A tensor as stored by the sources that have it, by their labels."""

_PIECE = 1 << 20


def common_starts(setting: Setting, fresh: Mapping[str, Holders]) -> dict[str, TensorInfo]:
    """Find the values that tensors started from, the same in every source that has them.

    Args:
        setting: the recipe and its inputs. Without a common start a method that needs a base is refused; another one
            merges all the same and notes that the result has no start.
        fresh: the tensors by the name they have in the full model.

    Returns:
        The starts that are known and common, by the same name.
    """
    own = {name: _starts(setting, name, fresh[name]) for name in sorted(fresh)}
    found: dict[str, TensorInfo] = {}
    unknown: dict[tuple[str, ...], list[str]] = {}
    different: dict[str, list[list[str]]] = {}
    for name, starts in own.items():
        absent = tuple(sorted(fresh[name].keys() - starts.keys()))
        alike = _alike(starts)
        if len(alike) > 1:
            different[name] = alike
        elif absent:
            unknown.setdefault(absent, []).append(name)
        else:
            found[name] = starts[alike[0][0]]
    if setting.method.base == "required":
        setting.problems.extend(_no_start(setting, names, absent) for absent, names in unknown.items())
        if different:
            setting.problems.append(CheckpointError(f"{_differences(different)}; train with one training.seed"))
        if found and setting.base is not None:
            what = f"{listed(list(found))}: not in {setting.base.label}"
            setting.notes.append(f"{what}; what they started from ({FRESH_NAME} of the sources) takes its place")
    elif any(own.values()):
        _note(setting, sorted(own.keys() - found.keys()), different)
    return found


def started_elsewhere(setting: Setting, held: Mapping[str, TensorInfo]) -> Iterator[CheckpointError]:
    """Refuse sources that brought a start along for what the base has: it is not the base that they were trained from.

    Args:
        setting: the recipe and its inputs.
        held: tensors of the base by their name in the full model.
    """
    for source in setting.sources if setting.method.base == "required" else ():
        names = sorted(source.starts.keys() & held.keys())
        if names and setting.base is not None:
            yield CheckpointError(
                f"{source.label}: its {listed(names)} started from values of its own ({FRESH_NAME}), but "
                f"{setting.base.label} has such tensors; expected the base that it was trained from"
            )


def left_alone(name: str, absent: Sequence[str]) -> MissingInputError:
    """The refusal of a tensor that some adapters leave as it is, where it is not known how it is."""
    return MissingInputError(
        f"{name}: stored whole by an adapter, so the base's weights are needed ({', '.join(absent)} leave it alone); "
        f"expected a base_model that has them, or {FRESH_NAME} beside the others"
    )


def _starts(setting: Setting, name: str, holders: Holders) -> dict[str, TensorInfo]:
    """The start of one tensor by source, of those that have the tensor and tell; another shape is a problem."""
    own = {}
    for source in sorted(setting.sources, key=lambda source: source.label):
        start, tensor = source.starts.get(name), holders.get(source.label)
        if start is None or tensor is None:
            continue
        if start.shape != tensor.shape:
            setting.problems.append(
                ShapeMismatchError(f"{start.path}: {name} has shape {start.shape}; expected {tensor.shape}, as trained")
            )
        own[source.label] = start
    return own


def _note(setting: Setting, without: Sequence[str], different: Mapping[str, Sequence[Sequence[str]]]) -> None:
    if different:
        setting.notes.append(f"{_differences(different)}; {setting.method.name} averages them all the same")
    if without:
        setting.notes.append(
            f"{listed(without)}: no start that all sources have in common, so the result has none in its {FRESH_NAME} "
            "and cannot be merged further by methods that need a base"
        )


def _no_start(setting: Setting, names: Sequence[str], absent: Sequence[str]) -> MissingInputError:
    base = setting.base.label if setting.base is not None else "the base"
    return MissingInputError(
        f"{listed(names)}: stored whole by {listed(absent)}, and {base} has nothing of that name, so it is not known "
        f"what training added; expected {FRESH_NAME} beside them, which bayes-merge writes when it trains a new head, "
        "or a base_model that has them, or a method that needs no base (linear, hessian_weighted)"
    )


def _differences(different: Mapping[str, Sequence[Sequence[str]]]) -> str:
    groups = next(iter(different.values()))
    seen = "; ".join(" and ".join(labels) for labels in groups)
    return f"{listed(list(different))}: the heads started from different values ({seen})"


def _alike(tensors: Mapping[str, TensorInfo]) -> list[list[str]]:
    """Labels grouped by what their tensors hold, byte for byte."""
    groups: dict[str, list[str]] = {}
    for label, tensor in tensors.items():
        groups.setdefault(_digest(tensor), []).append(label)
    return list(groups.values())


def _digest(tensor: TensorInfo) -> str:
    digest = hashlib.blake2b(f"{tensor.dtype} {tensor.shape}".encode(), digest_size=16)
    descriptor = open_regular(tensor.path)
    try:
        for start in range(0, tensor.nbytes, _PIECE):
            length = min(_PIECE, tensor.nbytes - start)
            digest.update(read_exactly(tensor.path, descriptor, length, tensor.offset + start))
    finally:
        os.close(descriptor)
    return digest.hexdigest()
