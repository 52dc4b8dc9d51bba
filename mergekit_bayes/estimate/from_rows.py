"""Precision from rows: group after group of targets, each shown all rows."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from mergekit_bayes.checkpoint.sidecar import SidecarMetadata
from mergekit_bayes.estimate.finish import Finished, finish
from mergekit_bayes.estimate.folder import SidecarFolder
from mergekit_bayes.estimate.memory import agree_on_bytes
from mergekit_bayes.estimate.notes import notes_on
from mergekit_bayes.estimate.passes import GroupSummary, Passes
from mergekit_bayes.estimate.progress import follow
from mergekit_bayes.estimate.request import Request
from mergekit_bayes.estimate.rows import Feed
from mergekit_bayes.estimate.setup import load_data, load_model, make_feed, targets_of
from mergekit_bayes.estimate.sidecar import describe_precision, write_group
from mergekit_bayes.precision.estimator import Estimator
from mergekit_bayes.precision.registry import EstimatorSpec, create, get_estimator
from mergekit_bayes.precision.targets import Target, Targets

__all__ = ["estimate_from_rows"]


@dataclass(frozen=True)
class _Work:
    """A run whose model is in memory."""

    request: Request
    folder: SidecarFolder
    model: Any
    feed: Feed
    groups: Sequence[Targets]
    metadata: SidecarMetadata

    def make(self, targets: Targets) -> Estimator:
        """An estimator of these targets that has seen nothing."""
        recipe = self.request.recipe
        return create(
            recipe.estimator.name,
            self.model,
            targets,
            seed=recipe.seed,
            chunk_size=recipe.batch_size,
            options=recipe.estimator.options.plain(),
        )


def estimate_from_rows(request: Request) -> Mapping[str, Any]:
    """Estimates the precision of what a recipe names from the rows of its data.

    Returns:
        The content of the report; empty in every process but the leading one.

    Raises:
        MergekitBayesError: model, data, disk or numbers did not allow it.
    """
    data = load_data(request.recipe, request.trained, recipe_dir=request.recipe_dir, tables=request.tables)
    folder = request.working_folder(data.train.fingerprint)
    with request.entered(folder):
        request.accelerator.wait_for_everyone()  # the leading process has prepared the folder
        loaded = load_model(request.recipe, request.trained, labels=data.labels, accelerator=request.accelerator)
        feed = make_feed(request.recipe, loaded, data, request.accelerator)
        targets = targets_of(request.recipe, loaded, request.trained)
        groups = _groups(request, folder, targets)
        work = _Work(request, folder, loaded.model, feed, groups, _metadata(request, feed))
        summaries = _estimate(work)
        if not request.leads:
            return {}
        notes = [*data.report.notes, *notes_on(feed, summaries, weight_decay=request.recipe.prior.weight_decay)]
        seen = summaries[-1].counts
        skipped = sorted({row for summary in summaries for row in summary.counts.skipped})
        rows = {"in_data": len(feed.rows), "seen": seen.rows, "skipped": [feed.name(row) for row in skipped]}
        files = [_file(number) for number in range(len(groups))]
        return finish(request, folder, Finished(work.metadata, files, rows, seen.units, _series(summaries), notes))


def _groups(request: Request, folder: SidecarFolder, targets: Targets) -> list[Targets]:
    options = request.recipe.estimator.options.plain()
    place = get_estimator(request.recipe.estimator.name).place
    assert place is not None  # an estimator that is shown data
    module, _, attribute = place.partition(":")
    kind: type[Estimator] = getattr(importlib.import_module(module), attribute)
    most = agree_on_bytes(request.recipe.max_memory, folder, request.accelerator)
    if request.leads:
        everything: list[Target] = [*targets.layers, *targets.weights]
        # the groups, and the sidecar that is made of them
        folder.require_space(2 * sum(kind.size(target, options) for target in everything))
    return list(targets.groups(most, lambda target: kind.size(target, options)))


def _metadata(request: Request, feed: Feed) -> SidecarMetadata:
    recipe = request.recipe
    spec: EstimatorSpec = get_estimator(recipe.estimator.name)
    known = {
        "family": spec.family,
        "estimator": spec.name,
        "space": recipe.space,
        "loss_unit": "token" if recipe.model.task == "causal_lm" else "example",
    }
    units = recipe.training_units if recipe.training_units is not None else feed.units
    return describe_precision(request.trained, known, num_examples=units, weight_decay=recipe.prior.weight_decay)


def _estimate(work: _Work) -> list[GroupSummary]:
    request, folder = work.request, work.folder
    summaries = []
    show = request.show and request.leads
    with follow(show=show, rows=len(work.feed.order), groups=len(work.groups)) as progress:
        passes = Passes(request.accelerator, folder, work.feed, request.recipe.max_skipped, progress)
        for number, targets in enumerate(work.groups):
            record = folder.journal.get(_file(number))
            if record is None:
                curvature, summary = passes.run(number, partial(work.make, targets))
                if request.leads:
                    dtype = getattr(torch, request.recipe.output.precision)
                    path = folder.staging / _file(number)
                    write_group(path, curvature, work.metadata, units=summary.counts.units, dtype=dtype)
                    folder.journal.add(_file(number), summary.record(), [_file(number)])
                request.accelerator.wait_for_everyone()
            else:
                summary = GroupSummary.of(record)
            summaries.append(summary)
    return summaries


def _file(group: int) -> str:
    return f"group-{group}.safetensors"


def _series(summaries: Sequence[GroupSummary]) -> dict[str, Any]:
    return {
        f"group {number + 1}, pass {index + 1}": changes
        for number, summary in enumerate(summaries)
        for index, changes in enumerate(summary.changes)
    }
