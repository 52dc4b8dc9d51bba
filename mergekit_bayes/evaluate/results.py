"""Everything an evaluation found, as plain data: scores with intervals, differences, reliability, notes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mergekit_bayes.data import Part, Task
from mergekit_bayes.evaluate.candidate import Candidate
from mergekit_bayes.evaluate.intervals import Ends, Key, intervals_of
from mergekit_bayes.evaluate.outcome import Outcome, comparable
from mergekit_bayes.evaluate.reliability import reliability
from mergekit_bayes.evaluate.scores import nothing, prediction_of, row_scores
from mergekit_bayes.evaluate.variants import Variant
from mergekit_bayes.model.environment import versions
from mergekit_bayes.predict.scores import Score
from mergekit_bayes.recipe.evaluate import METRICS, EvaluateRecipe

__all__ = ["FORMAT", "results_of", "results_text", "results_without_rows"]

FORMAT = "mergekit_bayes.evaluation"
VERSION = 1

Scores = Mapping[str, Mapping[str, Mapping[str, Score]]]
"""By title, data set and metric."""


def results_of(recipe: EvaluateRecipe, task: Task, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Returns the content of `results.json`.

    Args:
        recipe: what was asked for.
        task: of the models.
        outcomes: in the order of tables; the first of the baseline's is what the others are compared with.
    """
    metrics = recipe.metrics or METRICS[task]
    scores = {outcome.title: _scores(recipe, metrics, outcome) for outcome in outcomes}
    baseline = next(o for o in outcomes if o.candidate.title == recipe.baseline_title)
    ends = intervals_of(recipe, dict(_pairs(scores, baseline, outcomes)))
    first = outcomes[0].encoding
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "task": task,
        "baseline": baseline.title,
        "intervals": {"level": recipe.intervals.level, "resamples": recipe.intervals.resamples},
        "bins": recipe.bins,
        "seed": recipe.seed,
        "data": [_data(outcomes, index, part) for index, part in enumerate(first.rows.parts)],
        "models": {outcome.title: _model(outcome) for outcome in outcomes},
        "scores": {title: _values(found, title, ends) for title, found in scores.items()},
        "differences": {
            title: _differences(scores, baseline.title, title, ends) for title in scores if title != baseline.title
        },
        "notes": list(dict.fromkeys(_notes(outcomes, baseline))),
        "versions": versions(),
    }
    if task != "causal_lm":
        content["reliability"] = {o.title: _reliability(recipe, o) for o in outcomes}
    return content


def results_without_rows(recipe: EvaluateRecipe, task: Task, candidates: Sequence[Candidate]) -> dict[str, Any]:
    """Returns the content of `results.json` where nothing but tasks of lm-eval-harness was asked."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "task": task,
        "baseline": recipe.baseline_title,
        "data": [],
        "models": {each.title: _about(each) | asdict(Variant()) for each in candidates},
        "scores": {each.title: {} for each in candidates},
        "differences": {},
        "notes": [],
        "versions": versions(),
    }


def results_text(content: Mapping[str, Any]) -> str:
    """Returns results as JSON text with sorted keys; numbers that are not finite become null."""
    return json.dumps(_finite(content), indent=2, sort_keys=True, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scores(recipe: EvaluateRecipe, metrics: Sequence[str], outcome: Outcome) -> dict[str, dict[str, Score]]:
    return {
        part.name: row_scores(
            outcome.measured,
            outcome.encoding,
            part,
            metrics=metrics,
            bins=recipe.bins,
            coverage=recipe.coverage,
        )
        for part in outcome.encoding.rows.parts
    }


def _data(outcomes: Sequence[Outcome], index: int, part: Part) -> dict[str, Any]:
    """One data set: as the first model reads it, and its units by tokenizer."""
    units: dict[str, int] = {}
    for outcome in outcomes:
        rows = outcome.encoding.rows
        own = rows.parts[index]
        units[outcome.encoding.tokenizer] = int(rows.units[own.start : own.stop].sum())
    report = outcomes[0].encoding.reports[index]
    unit = "token" if outcomes[0].encoding.rows.task == "causal_lm" else "example"
    return {"name": part.name, "path": report.path, "rows": len(part), "unit": unit, "units": units}


def _about(candidate: Candidate) -> dict[str, Any]:
    return {
        "model": candidate.title,
        "reference": candidate.reference,
        "base": candidate.base,
        "fingerprint": candidate.fingerprint,
        "labels": None if candidate.labels is None else list(candidate.labels),
    }


def _model(outcome: Outcome) -> dict[str, Any]:
    return {
        **_about(outcome.candidate),
        "tokenizer": outcome.encoding.tokenizer,
        **asdict(outcome.variant),
        "chosen_temperature": outcome.chosen,
    }


def _pairs(scores: Scores, baseline: Outcome, outcomes: Sequence[Outcome]) -> Iterator[tuple[Key, tuple[Score, Score]]]:
    """Every score beside nothing, and beside that of the baseline where the two can be compared."""
    of_baseline = scores[baseline.title]
    for outcome in outcomes:
        for data, own in scores[outcome.title].items():
            for name, score in own.items():
                yield ("score", outcome.title, data, name), (nothing(score), score)
                if outcome is not baseline and name in of_baseline[data] and comparable(baseline, outcome, name):
                    yield ("difference", outcome.title, data, name), (of_baseline[data][name], score)


def _values(found: Mapping[str, Mapping[str, Score]], title: str, ends: Mapping[Key, Ends]) -> dict[str, Any]:
    return {
        data: {name: {"value": score.value, **ends["score", title, data, name]} for name, score in own.items()}
        for data, own in found.items()
    }


def _differences(scores: Scores, baseline: str, title: str, ends: Mapping[Key, Ends]) -> dict[str, Any]:
    """How much a model's scores are above those of the baseline, where the two can be compared."""
    return {
        data: {
            name: {
                "difference": score.value - scores[baseline][data][name].value,
                "higher_is_better": score.higher_is_better,
                **ends["difference", title, data, name],
            }
            for name, score in own.items()
            if ("difference", title, data, name) in ends
        }
        for data, own in scores[title].items()
    }


def _reliability(recipe: EvaluateRecipe, outcome: Outcome) -> dict[str, Any]:
    rows = outcome.encoding.rows
    return {
        part.name: reliability(prediction_of(outcome.measured, rows, part), bins=recipe.bins) for part in rows.parts
    }


def _notes(outcomes: Sequence[Outcome], baseline: Outcome) -> Iterator[str]:
    yield from (note for outcome in outcomes for note in outcome.encoding.notes)
    yield from (f"{outcome.title}: {outcome.note}" for outcome in outcomes if outcome.note is not None)
    for outcome in outcomes:
        yield from _temperature(outcome)
        yield from _other_tokens(outcome, baseline)
        yield from _single_rows(outcome)


def _temperature(outcome: Outcome) -> Iterator[str]:
    """What the validation rows chose."""
    chosen = outcome.chosen
    if chosen is None:
        return
    losses = f"nll {chosen['nll']:.4f} there, {chosen['nll_of_mean']:.4f} at the mean"
    if chosen["temperature"] == 0:
        yield f"{outcome.title}: on the validation rows no samples were better than the mean, which stands for them"
    else:
        edge = ", the highest that was tried: a higher one may be better" if chosen["at_edge"] else ""
        yield f"{outcome.title}: temperature {chosen['temperature']:.3g} by the validation rows ({losses}){edge}"


def _other_tokens(outcome: Outcome, baseline: Outcome) -> Iterator[str]:
    if outcome.encoding.tokenizer == baseline.encoding.tokenizer:
        return
    text = f"{outcome.title}: has another tokenizer than {baseline.title}"
    if outcome.encoding.rows.task == "causal_lm":
        text += "; loss and perplexity per token do not compare, bits per byte do"
    if not comparable(baseline, outcome, "rows"):
        yield f"{text}; the rows are cut otherwise, so there is no interval of the difference"
        return
    cut = any(report.truncated for each in (outcome, baseline) for report in each.encoding.reports)
    yield f"{text}; rows are cut to max_length at other places, so its scores are of other text" if cut else text


def _single_rows(outcome: Outcome) -> Iterator[str]:
    for part in outcome.encoding.rows.parts:
        if len(part) == 1:
            yield f"{part.name}: is a single row, from which no interval can be estimated"
