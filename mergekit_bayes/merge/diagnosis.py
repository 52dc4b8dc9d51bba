r"""What a merge is predicted to cost, and where its sources conflict, from its report alone: no data, no weights.

    mismatch of source t in tensor l = 0.5 sum (m - m_t)^2 (S_t - S_0)

is the loss that the posterior of t predicts it has lost there, nats over its training units. Where it is large the
merged weights are far from those the source needs, and sure of.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_bayes.checkpoint.files import brief, shown
from mergekit_bayes.errors import CheckpointError
from mergekit_bayes.merge.provenance import REPORT_NAME

__all__ = ["Conflict", "Diagnosis", "SourceCost", "place_of", "read_diagnosis", "short_labels"]

_FORMAT = "mergekit_bayes.merge_report"
_LAYER = re.compile(r"(?:^|\.)(\d{1,9})\.")


@dataclass(frozen=True)
class SourceCost:
    """What the merge costs one source.

    Attributes:
        label: the source, as the recipe names it.
        fingerprint: of its weights; None if the report has none.
        units: its training units; None if they are not known.
        by_tensor: predicted loss increase, nats over all units, by tensor.
    """

    label: str
    fingerprint: str | None
    units: float | None
    by_tensor: Mapping[str, float]

    @property
    def total(self) -> float:
        """Predicted loss increase, nats over all training units."""
        return sum(self.by_tensor.values())

    @property
    def per_unit(self) -> float | None:
        """The same per training unit, which is what an evaluation measures; None if the units are not known."""
        return self.total / self.units if self.units else None

    @property
    def scale(self) -> float:
        """Factor that makes numbers of sources comparable: per training unit where the units are known."""
        return 1 / self.units if self.units else 1.0


@dataclass(frozen=True)
class Conflict:
    """A tensor and what the merge costs there.

    Attributes:
        tensor: its name.
        by_source: predicted loss increase by label, per training unit where units are known.
    """

    tensor: str
    by_source: Mapping[str, float]

    @property
    def total(self) -> float:
        """Of all sources together."""
        return sum(self.by_source.values())


@dataclass(frozen=True)
class Diagnosis:
    """What a merge is predicted to cost.

    Attributes:
        folder: of the merge.
        method: its name.
        costs: of every source with precisions, in the order of the recipe.
    """

    folder: Path
    method: str
    costs: tuple[SourceCost, ...]

    @property
    def per_unit(self) -> bool:
        """Whether numbers of all sources are per training unit."""
        return all(cost.units for cost in self.costs)

    @property
    def conflicts(self) -> list[Conflict]:
        """Every tensor, the costliest first."""
        names = dict.fromkeys(name for cost in self.costs for name in cost.by_tensor)
        scales = {cost.label: cost.scale if self.per_unit else 1.0 for cost in self.costs}
        found = [
            Conflict(name, {c.label: scales[c.label] * c.by_tensor[name] for c in self.costs if name in c.by_tensor})
            for name in names
        ]
        return sorted(found, key=lambda conflict: (-conflict.total, conflict.tensor))


def read_diagnosis(folder: Path) -> Diagnosis:
    """Reads the report of a merge.

    Args:
        folder: that a merge has written.

    Raises:
        CheckpointError: there is no such report, or it is not whole; or the merge used no precisions, so that nothing
            is predicted.
    """
    path = folder / REPORT_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        costs = _costs(content)
        method = str(content["method"]["name"])
    except FileNotFoundError:
        expected = f"expected the output of a merge, with {REPORT_NAME}"
        raise CheckpointError(f"{shown(folder)}: holds no report of a merge; {expected}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{shown(path)}: cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{shown(path)}: is no report of a merge ({brief(error)}); expected what a merge wrote there"
        ) from error
    if not costs:
        raise CheckpointError(
            f"{shown(folder)}: {shown(method)} knew no precisions of its sources, so nothing is predicted; expected "
            "sources with sidecars (a recipe of kind `precision` estimates one) and a method that uses them"
        )
    return Diagnosis(folder, method, costs)


def _costs(content: Any) -> tuple[SourceCost, ...]:
    if content["format"] != _FORMAT:
        raise ValueError(f"format {content['format']}")
    inputs = {entry["reference"]: entry for entry in content["inputs"] if entry["role"] == "source"}
    order = {label: place for place, label in enumerate(inputs)}
    found = content["mismatch"]
    labels = sorted(found, key=lambda label: (order.get(label, len(order)), label))
    return tuple(
        SourceCost(
            label,
            inputs.get(label, {}).get("fingerprint"),
            found[label]["total"] / found[label]["per_unit"] if found[label]["per_unit"] else None,
            {str(name): float(value) for name, value in found[label]["by_layer"].items()},
        )
        for label in labels
    )


def short_labels(labels: Sequence[str]) -> dict[str, str]:
    """Labels without the folders that all of them lie in.

    Args:
        labels: of sources, each once.
    """
    parts = [label.split("/") for label in labels]
    common = 0
    while len(labels) > 1 and len({tuple(each[: common + 1]) for each in parts}) == 1:
        common += 1
    return {label: "/".join(each[common:]) or label for label, each in zip(labels, parts, strict=True)}


def place_of(tensor: str) -> tuple[int | None, str]:
    """The number of a tensor's layer and its name within it; no number for tensors outside the layers.

    Layers of several stacks, such as encoder and decoder, keep the name of their stack.

    Args:
        tensor: its name.
    """
    name = tensor.removesuffix(".weight")
    found = _LAYER.search(name)
    if found is None:
        return None, name
    stack = tensor[: found.start()].rpartition(".")[2]
    inside = name[found.end() :]
    return int(found[1]), inside if stack in ("", "layers", "layer", "h", "blocks") else f"{stack}.{inside}"
