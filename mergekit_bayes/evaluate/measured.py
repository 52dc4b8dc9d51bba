"""What a merge cost by evaluation, beside what its report predicted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from mergekit_bayes.checkpoint.files import brief, listed, shown
from mergekit_bayes.errors import EvaluateError
from mergekit_bayes.evaluate.results import FORMAT
from mergekit_bayes.evaluate.run import RESULTS_NAME
from mergekit_bayes.merge.diagnosis import Diagnosis, SourceCost
from mergekit_bayes.merge.inputs import open_input

__all__ = ["Comparison", "compare_with"]

_METRICS = ("loss", "nll")


@dataclass(frozen=True)
class Comparison:
    """One source on the data of its task.

    Attributes:
        label: the source.
        data: the data set.
        predicted: loss increase per training unit by the report, nats; None if its units are not known.
        measured: loss of the merge less that of the source, nats per unit.
    """

    label: str
    data: str
    predicted: float | None
    measured: float


def compare_with(diagnosis: Diagnosis, results: Path, tasks: Mapping[str, str] | None = None) -> list[Comparison]:
    """Compares predictions with an evaluation of the merge and its sources.

    Models are recognised by their weights. The data of a source's task are those of `tasks`, else the data set that is
    called like the last part of the source's name.

    Args:
        diagnosis: of the merge.
        results: folder of an evaluation.
        tasks: names of data sets by the labels of sources.

    Raises:
        EvaluateError: the folder holds no results; the merge or a source was not evaluated at its mean; or the data of
            a source cannot be told.
    """
    content = _read(results)
    merged = _losses(content, open_input(str(diagnosis.folder), False, base_dir=Path()).fingerprint)
    if merged is None:
        raise EvaluateError(
            f"{shown(results)}: has no loss of {shown(diagnosis.folder)}; expected the merge among its models"
        )
    return list(_comparisons(diagnosis, content, merged, tasks or {}, results))


def _comparisons(
    diagnosis: Diagnosis, content: Any, merged: Mapping[str, float], tasks: Mapping[str, str], results: Path
) -> Iterator[Comparison]:
    strange = sorted(set(tasks) - {cost.label for cost in diagnosis.costs})
    if strange:
        known = listed([cost.label for cost in diagnosis.costs])
        raise EvaluateError(f"{listed(strange)}: is no source of this merge; those are {known}")
    for cost in diagnosis.costs:
        alone = None if cost.fingerprint is None else _losses(content, cost.fingerprint)
        if alone is None:
            raise EvaluateError(
                f"{shown(results)}: has no loss of {shown(cost.label)}; expected the sources among its models"
            )
        data = _data_of(cost, tasks, list(merged))
        yield Comparison(cost.label, data, cost.per_unit, merged[data] - alone[data])


def _data_of(cost: SourceCost, tasks: Mapping[str, str], known: list[str]) -> str:
    data = tasks.get(cost.label, PurePath(cost.label.rpartition("+")[2]).name)
    if data not in known:
        raise EvaluateError(
            f"{shown(cost.label)}: which data set is of its task? The results have {listed(known)}; name it with "
            f"`--task {cost.label}=DATA`"
        )
    return data


def _losses(content: Any, fingerprint: str) -> dict[str, float] | None:
    """Loss by data set of the model with these weights, at its mean."""
    for title, model in content["models"].items():
        if model["fingerprint"] == fingerprint and not model["samples"] and not model["prune"]:
            scores = content["scores"][title]
            found = {data: own[name]["value"] for data, own in scores.items() for name in _METRICS if name in own}
            return {data: float(value) for data, value in found.items() if value is not None} or None
    return None


def _read(folder: Path) -> Any:
    path = folder / RESULTS_NAME if folder.is_dir() else folder
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise EvaluateError(
            f"{shown(path)}: holds no results of an evaluation ({brief(error)}); expected the folder that a recipe of "
            "kind `evaluate` wrote"
        ) from error
    return content
