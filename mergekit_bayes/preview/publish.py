"""From what was predicted and evaluated to files: front.json, points.csv, figures, and a few lines for a terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_bayes.preview.costs import cost_table, source_seconds
from mergekit_bayes.preview.design import Mix
from mergekit_bayes.preview.fitted import fit_scores
from mergekit_bayes.preview.folder import FRONT_NAME, PreviewFolder
from mergekit_bayes.preview.page import write_page
from mergekit_bayes.preview.plans import MethodPlan
from mergekit_bayes.preview.references import ReferenceRun, against_references, reference_runs
from mergekit_bayes.preview.results import TIERS, Array, Point, Scale, front_of, number, points_as_data, scores_of
from mergekit_bayes.preview.summary import summary_of
from mergekit_bayes.preview.sweep import Group
from mergekit_bayes.preview.table import points_table
from mergekit_bayes.recipe.preview import PreviewRecipe

if TYPE_CHECKING:
    from mergekit_bayes.preview.predict import Predictions

__all__ = ["Found", "publish"]


@dataclass(frozen=True, eq=False)
class Found:
    """Everything that a run of a preview came to know.

    Attributes:
        recipe: what was asked for.
        plans: one per method.
        mixes: the design, in order.
        groups: what was to be evaluated, base and experts first.
        records: evaluations by key, also those of earlier runs.
        predictions: of the posteriors, in the order of plans and mixes; None where they were not asked.
        units: tokens or examples that every task was scored on.
        seconds: spent now, by tier.
        stopped: whether somebody stopped the run.
    """

    recipe: PreviewRecipe
    plans: Sequence[MethodPlan]
    mixes: Sequence[Mix]
    groups: Sequence[Group]
    records: Mapping[str, Mapping[str, Any]]
    predictions: Predictions | None
    units: Mapping[str, int] | None
    seconds: Mapping[str, float]
    stopped: bool

    @property
    def higher(self) -> tuple[bool, ...]:
        """For every task, whether more is better."""
        return tuple(task.higher_is_better for task in self.recipe.tasks)


def publish(found: Found, folder: PreviewFolder) -> tuple[dict[str, Any], str]:
    """Writes everything.

    Returns:
        The content of front.json, and what a terminal shows.

    Raises:
        OutputError: the disk failed.
    """
    points, corners = _points(found)
    scale = None if corners is None else Scale(corners[0], _own(found, corners[1]), found.higher)
    if scale is not None:
        _evaluate_gains(points, scale)
    if found.predictions is not None:
        _predict_gains(found, points)
    fits = _fit(found, points, scale) if "fitted" in found.recipe.fidelity else None
    content = _content(found, points, scale, corners, fits)
    folder.write(FRONT_NAME, json.dumps(content, indent=1) + "\n")
    folder.write("points.csv", points_table(points, found.recipe.task_names, len(found.recipe.models)))
    _draw(content, folder)
    if found.recipe.output.html:
        folder.make("front.html", partial(write_page, content))
    return content, summary_of(content, str(folder.path), page=found.recipe.output.html)


def _points(found: Found) -> tuple[list[Point], tuple[Array, Array] | None]:
    """Every point of the design, and the scores of base and sources if they were evaluated."""
    by_place: dict[tuple[str, Mix], Point] = {}
    for plan in found.plans:
        by_place |= {(plan.title, mix): Point(plan.title, mix) for mix in found.mixes}
    corners: dict[Mix, Array] = {}
    for group in found.groups:
        for mix, key in zip(group.mixes, group.keys, strict=True):
            record = found.records.get(key)
            if record is None:
                continue
            scores = scores_of(found.recipe, record)
            if group.needed:
                corners |= {mix: scores} if group.is_corner else {}
                continue
            point = by_place[group.method.title, mix]
            point.seconds, point.error = record.get("seconds"), record.get("error")
            point.scores["evaluated"] = scores
    sources = len(found.recipe.models)
    wanted = [(0.0,) * sources, *(tuple(row) for row in np.eye(sources).tolist())]
    if not all(mix in corners for mix in wanted):
        return list(by_place.values()), None
    return list(by_place.values()), (corners[wanted[0]], np.stack([corners[mix] for mix in wanted[1:]]))


def _own(found: Found, experts: Array) -> Array:
    """The score of each task's own expert, shape (tasks,)."""
    return experts[list(found.recipe.experts), range(len(found.recipe.tasks))]


def _evaluate_gains(points: Sequence[Point], scale: Scale) -> None:
    for point in points:
        if "evaluated" in point.scores:
            point.gains["evaluated"] = scale.gains(point.scores["evaluated"])


def _predict_gains(found: Found, points: Sequence[Point]) -> None:
    assert found.predictions is not None  # the caller has looked
    tasks = list(found.recipe.experts)
    base = found.predictions.at_base[tasks]
    scale = Scale(base, np.zeros_like(base), (False,) * len(tasks))
    increases = np.concatenate([method.increases[:, tasks] for method in found.predictions.methods])
    for point, increase in zip(points, increases, strict=True):
        point.scores["surrogate"], point.gains["surrogate"] = increase, scale.gains(increase)


def _fit(found: Found, points: Sequence[Point], scale: Scale | None) -> dict[str, Any]:
    """Gives every point the score of a polynomial through the evaluated mixes of its method; says how good it is."""
    about: dict[str, Any] = {}
    for plan in found.plans:
        own = [point for point in points if point.method == plan.title]
        known = {point.mix: point.scores["evaluated"] for point in own if "evaluated" in point.scores}
        fit = fit_scores([point.mix for point in own], known)
        if fit is None:
            about[plan.title] = None
            continue
        about[plan.title] = {
            "fitted_to": fit.fitted_to,
            "left_out_error": _by_task(fit.error, found.recipe.task_names),
        }
        for point, scores in zip(own, fit.scores, strict=True):
            if scale is not None:
                point.scores["fitted"], point.gains["fitted"] = scores, scale.gains(scores)
    return about


def _content(
    found: Found,
    points: Sequence[Point],
    scale: Scale | None,
    corners: tuple[Array, Array] | None,
    fits: Mapping[str, Any] | None,
) -> dict[str, Any]:
    recipe, names = found.recipe, found.recipe.task_names
    tiers = [tier for tier in TIERS if any(tier in point.gains for point in points)]
    fronts = {tier: front_of(points, tier, names) for tier in tiers}
    runs = reference_runs(recipe, found.groups, found.records)
    folders = [source.places[0] for source in found.plans[0].plan.sources]
    from mergekit_bayes import __version__

    return {
        "kind": "preview",
        "version": __version__,
        "complete": not found.stopped and _missing(found) == 0,
        "recipe_dir": None if recipe.folder is None else str(recipe.folder),
        "base_model": recipe.base_model,
        "models": [source.model for source in recipe.models],
        "methods": [plan.title for plan in found.plans],
        "tasks": [
            {
                "name": name,
                "expert": recipe.models[expert].model,
                "metric": task.metric,
                "better": "higher" if task.higher_is_better else "lower",
                **({} if name not in (found.units or {}) else {"units": (found.units or {})[name]}),
            }
            for name, task, expert in zip(names, recipe.tasks, recipe.experts, strict=True)
        ],
        "base": None if corners is None else _by_task(corners[0], names),
        "experts": None
        if corners is None
        else {source.model: _by_task(scores, names) for source, scores in zip(recipe.models, corners[1], strict=True)},
        "tiers": fronts,
        "skipped": _skipped(found),
        "surrogate": _about_predictions(found),
        "fitted": fits,
        "references": against_references(runs, points, recipe=recipe, scale=scale, tiers=tiers),
        "costs": _costs(found, [source_seconds(folder) for folder in folders], runs),
        "notes": [*_notes(found, points, scale), *_failed_references(runs)],
        "points": points_as_data(points, names),
    }


def _by_task(scores: Array, names: Sequence[str]) -> dict[str, float | None]:
    return {name: number(value) for name, value in zip(names, scores, strict=True)}


def _missing(found: Found) -> int:
    return sum(key not in found.records for group in found.groups for key in group.keys)


def _skipped(found: Found) -> int:
    """Mixes of the design that were not evaluated, for want of budget or time."""
    if not found.groups:
        return 0
    there = sum(key in found.records for group in found.groups if not group.needed for key in group.keys)
    return len(found.mixes) * len(found.plans) - there


def _about_predictions(found: Found) -> dict[str, Any] | None:
    if found.predictions is None:
        return None
    names = found.recipe.task_names
    return {
        "increase_at_base": _by_task(found.predictions.at_base[list(found.recipe.experts)], names),
        "methods": {
            plan.title: {"form": method.form, "largest_error": method.error}
            for plan, method in zip(found.plans, found.predictions.methods, strict=True)
        },
    }


def _costs(found: Found, sources: Sequence[Mapping[str, float]], runs: Sequence[ReferenceRun]) -> dict[str, Any]:
    evaluated = sum(
        float(record.get("seconds", 0.0))
        for group in found.groups
        for key in group.keys
        if (record := found.records.get(key)) is not None
    )
    return cost_table(
        sources,
        surrogate=found.seconds.get("surrogate"),
        evaluated=evaluated,
        mixes=len(found.mixes),
        reference_minutes=[run.minutes for run in runs],
    )


def _notes(found: Found, points: Sequence[Point], scale: Scale | None) -> list[str]:
    names, notes = found.recipe.task_names, []
    failed = [point for point in points if point.error is not None]
    if failed:
        first = failed[0]
        where = f"{first.method} at {', '.join(f'{weight:g}' for weight in first.mix)}"
        notes.append(f"{len(failed)} mixes could not be evaluated; the first is {where}: {first.error}")
    if skipped := _skipped(found):
        notes.append(f"{skipped} mixes of the design were not evaluated{_out_of_time(found)}")
    for task in [] if scale is None else scale.hopeless:
        notes.append(f"{names[task]}: its expert is no better than the base in it, so its scale says little")
    if "fitted" in found.recipe.fidelity and not any("fitted" in p.gains for p in points):
        notes.append("too few mixes were evaluated for a quadratic to be fitted")
    if found.groups and scale is None:
        notes.append("base or experts could not be evaluated, so there is no scale that tasks have in common")
    broken = sum(
        point.error is None and bool(np.isnan(point.scores["evaluated"]).any())
        for point in points
        if "evaluated" in point.scores
    )
    if broken:
        notes.append(f"{broken} evaluated mixes have a score that is no number; they are on no front")
    nan = sum(
        bool(np.isnan(gains).any()) for point in points for tier, gains in point.gains.items() if tier != "evaluated"
    )
    if nan:
        notes.append(f"{nan} predictions are no numbers: a precision is not positive there")
    return notes


def _out_of_time(found: Found) -> str:
    """How many mixes were chosen and then not begun because the minutes were over."""
    minutes, late = found.recipe.budget.minutes, _missing(found)
    if minutes is None or found.stopped or not late:
        return ""
    return f", {late} of them because `budget.minutes: {minutes:g}` was over; the same call goes on with these"


def _failed_references(runs: Sequence[ReferenceRun]) -> list[str]:
    """References that were to be evaluated and have no scores."""
    return [
        f"reference {run.name} {f'could not be evaluated: {run.error}' if run.error else 'was not evaluated'}"
        for run in runs
        if not np.isfinite(run.scores).all()
    ]


def _draw(content: Mapping[str, Any], folder: PreviewFolder) -> None:
    from mergekit_bayes.preview.figures import draw

    for suffix in ("png", "svg"):
        folder.make(f"front.{suffix}", partial(draw, content, suffix=suffix))
