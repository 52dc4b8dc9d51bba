"""`bayes-merge diagnose MERGE`: what a merge is predicted to cost and where its sources conflict."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .failure import exit_codes

if TYPE_CHECKING:
    from mergekit_bayes.evaluate.measured import Comparison
    from mergekit_bayes.merge.diagnosis import Diagnosis
    from mergekit_bayes.preview.families import FamilyCosts


def diagnose(
    merge: Annotated[
        Path, typer.Argument(help="Folder that a merge has written, or a merge recipe.", show_default=False)
    ],
    *,
    top: Annotated[int, typer.Option(min=0, metavar="N", help="How many tensors to list.")] = 10,
    figure: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where the heat map goes.", show_default="mismatch.png in the folder"),
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
    families: Annotated[
        bool,
        typer.Option(
            "--families",
            help="Also say how much of it richer posteriors would remove; reads the sources, draws families.png.",
        ),
    ] = False,
) -> None:
    """Show what a merge is predicted to cost each source, and where they conflict.

    Reads the report of the merge, no weights and no data, and draws the heat map of it. With --families the sources
    are read, and merges by isotropic, diagonal and Kronecker posteriors are compared at the same weights. Of a recipe,
    which has no report yet, that comparison is all: nothing is written but a figure that --figure names.
    """
    with exit_codes():
        if merge.is_file():
            _refuse_for_recipes(results, task)
            print("\n".join(_families(merge, figure)))
            return
        from mergekit_bayes.merge.diagnosis import read_diagnosis

        found = read_diagnosis(merge)
        lines = [*_costs(found), *_conflicts(found, top)]
        if results is not None:
            from mergekit_bayes.evaluate.measured import compare_with

            lines += _compared(compare_with(found, results, _tasks(task or [])))

        if families:
            from mergekit_bayes.merge.finish import RECIPE_NAME

            lines += _families(merge / RECIPE_NAME, merge / "families.png")

        from mergekit_bayes.merge.heat_map import draw_heat_map

        path = figure if figure is not None else merge / "mismatch.png"
        draw_heat_map(path, found)
        print("\n".join([*lines, f"heat map: {path}"]))


def _refuse_for_recipes(results: Path | None, task: list[str] | None) -> None:
    for name, given in (("--results", results), ("--task", task)):
        if given:
            raise typer.BadParameter(
                "a recipe has no merge to compare with; name the folder of one", param_hint=f"'{name}'"
            )


def _families(recipe: Path, figure: Path | None) -> Iterator[str]:
    from mergekit_bayes.preview.families import compare_families

    costs = compare_families(recipe)
    yield from _by_family(costs)
    if figure is not None:
        from mergekit_bayes.preview.family_figure import draw_families

        draw_families(figure, costs)
        yield f"families: {figure}"


def _by_family(costs: FamilyCosts) -> Iterator[str]:
    from mergekit_bayes.merge.diagnosis import short_labels

    unit = "nats per training unit" if costs.per_unit else "nats"
    short = short_labels(costs.labels)
    yield f"merges by poorer and richer posteriors, judged by the {costs.judge} ones, {unit}:"
    for row in costs.by_tensor:
        by_source = ", ".join(f"{short[label]} {costs.cost(row, label):.3g}" for label in costs.labels)
        removed = costs.removed(row)
        change = "" if row == "isotropic" or removed is None else f", {_changed(removed)}"
        name = f"{row} ({costs.method})" if row == "this merge" else row
        yield f"  {name}: {costs.total(row):.4g} in all{change}: {by_source}"


def _changed(removed: float) -> str:
    return f"{removed:.0%} less than isotropic" if removed >= 0 else f"{-removed:.0%} more than isotropic"


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
