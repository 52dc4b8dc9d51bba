"""`bayes-merge diagnose MERGED`: what a merge is predicted to cost and where its sources conflict."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .failure import exit_codes

if TYPE_CHECKING:
    from mergekit_bayes.evaluate.measured import Comparison
    from mergekit_bayes.merge.diagnosis import Diagnosis


def diagnose(
    merged: Annotated[Path, typer.Argument(help="Folder that a merge has written.", show_default=False)],
    *,
    top: Annotated[int, typer.Option(min=0, metavar="N", help="How many tensors to list.")] = 10,
    figure: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the heat map goes.", show_default="mismatch.png in MERGED"),
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Evaluation of the merge and its sources, to compare with.", show_default="none"
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            "--task",
            metavar="SOURCE=DATA",
            help="Data set of a source's task; may be repeated.",
            show_default="called like the source",
        ),
    ] = None,
) -> None:
    """Show what a merge is predicted to cost each source, and where they conflict.

    Reads the report of the merge, no weights and no data, and draws the heat map of it.
    """
    with exit_codes():
        from mergekit_bayes.merge.diagnosis import read_diagnosis

        found = read_diagnosis(merged)
        lines = [*_costs(found), *_conflicts(found, top)]
        if results is not None:
            from mergekit_bayes.evaluate.measured import compare_with

            lines += _compared(compare_with(found, results, _tasks(task or [])))

        from mergekit_bayes.merge.heat_map import draw_heat_map

        path = figure if figure is not None else merged / "mismatch.png"
        draw_heat_map(path, found)
        print("\n".join([*lines, f"heat map: {path}"]))


def _tasks(given: list[str]) -> dict[str, str]:
    pairs = [text.rpartition("=") for text in given]
    for text, (source, _, data) in zip(given, pairs, strict=True):
        if not source or not data:
            raise typer.BadParameter(f"expected SOURCE=DATA, found {text}", param_hint="'--task'")
    return {source: data for source, _, data in pairs}


def _costs(found: Diagnosis) -> Iterator[str]:
    yield f"{found.folder}: predicted loss increase by {found.method}"
    for cost in found.costs:
        worst = max(cost.by_tensor, key=lambda name: cost.by_tensor[name])
        share = cost.by_tensor[worst] / cost.total if cost.total else 0.0
        per_unit = "units not known" if cost.per_unit is None else f"{cost.per_unit:.3g} nats per training unit"
        yield f"  {cost.label}: {per_unit}, {cost.total:.4g} nats in all, most in {worst} ({share:.0%})"


def _conflicts(found: Diagnosis, top: int) -> Iterator[str]:
    from mergekit_bayes.merge.diagnosis import short_labels

    unit = "nats per training unit" if found.per_unit else "nats"
    conflicts, short = found.conflicts, short_labels([cost.label for cost in found.costs])
    total = sum(conflict.total for conflict in conflicts)
    if top:
        yield f"tensors that conflict most, {unit}:"
    for conflict in conflicts[:top]:
        by_source = ", ".join(f"{short[label]} {value:.2g}" for label, value in conflict.by_source.items())
        share = conflict.total / total if total else 0.0
        yield f"  {conflict.tensor}: {conflict.total:.3g} ({share:.1%}): {by_source}"


def _compared(comparisons: list[Comparison]) -> Iterator[str]:
    yield "predicted and measured loss increase, nats per unit:"
    for each in comparisons:
        predicted = "unknown" if each.predicted is None else f"{each.predicted:.4f}"
        yield f"  {each.label} on {each.data}: predicted {predicted}, measured {each.measured:.4f}"
