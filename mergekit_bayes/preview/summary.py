"""What a preview found, in a few lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["summary_of"]

_TIER_WORDS = {
    "evaluated": "evaluated",
    "fitted": "fitted to evaluated mixes",
    "surrogate": "predicted by the posteriors",
}


def summary_of(content: Mapping[str, Any], folder: str, *, page: bool = False) -> str:
    """The fronts of all tiers, the costs and the notes.

    Args:
        content: of front.json.
        folder: where it lies.
        page: whether an interactive page is there.
    """
    tasks = [task["name"] for task in content["tasks"]]
    lines = [f"{folder}: front.json, points.csv, front.png, front.svg{', front.html' if page else ''}"]
    for tier, front in content["tiers"].items():
        lines += ["", f"{_TIER_WORDS[tier]}; 0 is the base, 1 the expert of each task ({', '.join(tasks)})"]
        for method, measures in front["methods"].items():
            lines.append(f"  {method}: {measures['points']} mixes, hypervolume {measures['hypervolume']:.4f}")
            for word in ("max_min", "knee"):
                if measures[word] is not None:
                    lines.append(
                        f"    {word.replace('_', '-'):8} {_described(content['points'][measures[word]], tier)}"
                    )
    lines += [
        *_fits(content),
        *_references(content),
        "",
        *_costs(content["costs"]),
        *(f"note: {note}" for note in content["notes"]),
    ]
    lines.append(f"next: bayes-merge pick {folder} --max-min > recipe.yaml")
    return "\n".join(lines)


def _fits(content: Mapping[str, Any]) -> list[str]:
    """How far fitted scores are off at mixes that were left out."""
    lines = []
    for method, fit in (content["fitted"] or {}).items():
        if fit is not None:
            errors = ", ".join(
                f"{task} {'unknown' if e is None else f'{e:.3g}'}" for task, e in fit["left_out_error"].items()
            )
            lines.append(f"  {method} fitted to {fit['fitted_to']} mixes; error where left out: {errors}")
    return lines


def _references(content: Mapping[str, Any]) -> list[str]:
    """How far every tier is from real runs."""
    lines = []
    for tier, methods in content["references"].get("tiers", {}).items():
        for method, report in methods.items():
            if report["previewed"]:
                ranks = ", ".join("nan" if each is None else f"{each:.2f}" for each in report["spearman"].values())
                regret = report["regret"]["max_min"]
                shown = "unknown" if regret is None else f"{regret:.3f}"
                lines.append(
                    f"  {method}, {tier}, against {report['previewed']} reference runs: Spearman {ranks}; regret of "
                    f"max-min {shown}"
                )
    return ["", "reference runs", *lines] if lines else []


def _described(point: Mapping[str, Any], tier: str) -> str:
    weights = ", ".join(f"{weight:g}" for weight in point["weights"])
    gains: Sequence[float | None] = list(point[tier]["normalised"].values())
    return f"weights {weights}: {', '.join('nan' if gain is None else f'{gain:.2f}' for gain in gains)}"


def _costs(costs: Mapping[str, Any]) -> list[str]:
    parts = [
        ("training of the sources", costs["training_of_sources"]),
        ("precision passes", costs["precision_passes"] or None),
        ("posteriors' predictions", costs["surrogate"]),
        ("evaluation", costs["evaluation"] or None),
    ]
    lines = [
        f"cost: {', '.join(f'{name} {_time(seconds)}' for name, seconds in parts if seconds is not None) or 'unknown'}"
    ]
    if costs["seconds_they_would_take"] is not None:
        lines.append(
            f"  {costs['runs_it_stands_for']} runs on all tasks would take {_time(costs['seconds_they_would_take'])} "
            f"({_time(costs['one_run_on_all_tasks'])} each, {costs['one_run_is']})"
        )
    return lines


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 3600 else f"{seconds / 3600:.3g} h"
