"""The evaluated tier: base, experts and mixes, split over processes, in one sweep or in rounds that adapt."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING

import numpy as np

from mergekit_bayes.merge.processes import Processes
from mergekit_bayes.preview.adaptive import next_mixes
from mergekit_bayes.preview.cache import EvaluationCache
from mergekit_bayes.preview.design import Mix
from mergekit_bayes.preview.evaluators import Evaluations, Evaluator, load_ground
from mergekit_bayes.preview.fitted import DEGREE
from mergekit_bayes.preview.plans import MethodPlan, plan_corners, plan_references
from mergekit_bayes.preview.polynomial import polynomial_terms
from mergekit_bayes.preview.progress import follow
from mergekit_bayes.preview.results import Array, Scale, scores_of
from mergekit_bayes.preview.sweep import Group, groups_of, in_turns, run_groups, within_budget
from mergekit_bayes.recipe.preview import PreviewRecipe

if TYPE_CHECKING:
    from mergekit_bayes.data.read import Tables

__all__ = ["Evaluation"]

FIRST_SHARE = 0.4
"""Of a budget that adapts, evaluated as the design has it before anything is foreseen."""


def _identity(evaluator: Evaluator) -> str:
    """What is known of an evaluator: what it says itself that its scores depend on, else its name."""
    return str(getattr(evaluator, "identity", getattr(evaluator, "__qualname__", "")))


class Evaluation:
    """Everything that is evaluated for one preview.

    Args:
        recipe: of the preview.
        plans: one per method.
        cache: of this process.
        processes: all that share the work.
        recipe_dir: folder that relative paths are tried from after the current one.
        tables: data sets in memory, by the path that stands for them.
        evaluators: scores of your own, by task.

    Attributes:
        ground: the model and the tasks.
    """

    def __init__(
        self,
        recipe: PreviewRecipe,
        plans: Sequence[MethodPlan],
        cache: EvaluationCache,
        processes: Processes,
        *,
        recipe_dir: Path | None,
        tables: Tables | None,
        evaluators: Mapping[str, Evaluator],
    ) -> None:
        self.recipe, self.plans, self.cache, self.processes = recipe, plans, cache, processes
        self.corners = plan_corners(recipe, recipe_dir)
        self._references = plan_references(recipe, recipe_dir)
        local = int(os.environ.get("LOCAL_RANK", "0"))
        self.ground = load_ground(recipe, recipe_dir=recipe_dir, tables=tables, local_rank=local)
        own = [f"{name}:{_identity(each)}" for name, each in sorted(evaluators.items())]
        tasks = [(task.name, task.key) for task in self.ground.tasks]
        self._elsewhere: frozenset[str] = frozenset()
        self._inputs = [tasks, str(self.ground.dtype), self.ground.device.type, own]
        spec = recipe.evaluation
        self._evaluations = Evaluations(self.ground, spec.mixes_per_batch, spec.max_memory, evaluators)

    def run(self, mixes: Sequence[Mix], *, stopped: Callable[[], bool], show: bool) -> list[Group]:
        """Evaluates what the budget allows and is not in the cache.

        Args:
            mixes: the design, in order.
            stopped: whether somebody asked to stop.
            show: whether to show how far it is.

        Returns:
            All groups, base and experts first, then references, evaluated or not.
        """
        budget, began = self.recipe.budget, monotonic()
        designs = [mixes] * len(self.plans)
        first = within_budget(designs, self._first(len(mixes)))
        needed = self._needed()
        self._elsewhere = frozenset(key for group in needed for key in group.keys)
        groups = [*needed, *self._groups(first)]
        later = 0 if budget.points is None else budget.points - sum(map(len, first))
        total = sum(len(group.mixes) for group in groups) + (later if self.recipe.design.adaptive else 0)
        with self._evaluations, follow(total, show=show) as report:

            def late() -> bool:
                return budget.minutes is not None and monotonic() - began > 60 * budget.minutes

            def carry_out(some: Sequence[Group]) -> None:
                run_groups(
                    some,
                    self._evaluations,
                    self.cache,
                    processes=self.processes,
                    late=late,
                    stopped=stopped,
                    report=report,
                )
                self.processes.barrier()

            carry_out(needed)
            carry_out(groups[len(needed) :])
            if self.recipe.design.adaptive and budget.points is not None:
                self._adapt(mixes, groups, later, carry_out)
        return groups

    def _first(self, size: int) -> int | None:
        """Mixes of all methods that are evaluated as the design has them; None for all of them."""
        points = self.recipe.budget.points
        if points is None or not self.recipe.design.adaptive:
            return points
        enough = polynomial_terms(len(self.recipe.models), DEGREE) + 1
        return min(points, len(self.plans) * min(size, max(enough, round(FIRST_SHARE * points / len(self.plans)))))

    def _adapt(
        self, mixes: Sequence[Mix], groups: list[Group], points: int, carry_out: Callable[[Sequence[Group]], None]
    ) -> None:
        """Spends what is left of a budget in rounds; what a round chooses depends on the rounds before it alone."""
        most = self.processes.count * max(self._evaluations.together(plan) for plan in self.plans)
        while points > 0:
            chosen: list[list[Mix]] = []
            for plan in self.plans:
                chosen.append(next_mixes(mixes, self._gains(plan, groups), min(points, most)))
                points -= len(chosen[-1])
            if not any(chosen):
                return
            new = self._groups(chosen)
            groups += new
            carry_out(new)

    def _gains(self, plan: MethodPlan, groups: Sequence[Group]) -> dict[Mix, Array]:
        """What is known of the mixes of one method, on the scale of base and experts; NaN where it is not."""
        records = self.cache.read()
        tasks = range(len(self.recipe.tasks))

        def scored(wanted: Callable[[Group], bool]) -> dict[Mix, Array]:
            pairs = [
                (mix, key)
                for group in groups
                if wanted(group)
                for mix, key in zip(group.mixes, group.keys, strict=True)
            ]
            return {mix: scores_of(self.recipe, records.get(key)) for mix, key in pairs}

        corners = list(scored(lambda group: group.is_corner).values())
        own = np.stack(corners[1:])[list(self.recipe.experts), tasks]
        scale = Scale(corners[0], own, tuple(task.higher_is_better for task in self.recipe.tasks))
        return {mix: scale.gains(scores) for mix, scores in scored(lambda group: group.method is plan).items()}

    def _needed(self) -> list[Group]:
        """The base, every source alone, and the references that are models."""
        sources = len(self.recipe.models)
        mixes = [(0.0,) * sources, *(tuple(row) for row in np.eye(sources).tolist())]
        together = self._evaluations.together(self.corners)
        groups = groups_of(self.corners, mixes, together=together, inputs=self._inputs, needed=True)
        for index, plan in self._references.items():
            (group,) = groups_of(plan, [(1.0,)], together=1, inputs=self._inputs, needed=True)
            groups.append(replace(group, reference=index))
        return groups

    def _groups(self, chosen: Sequence[Sequence[Mix]]) -> list[Group]:
        """Groups of the chosen mixes of every method, the methods in turn."""
        of_methods = [
            groups_of(
                plan,
                mine,
                together=self._evaluations.together(plan),
                inputs=self._inputs,
                elsewhere=self._elsewhere,  # an expert is a mix of many a method
            )
            for plan, mine in zip(self.plans, chosen, strict=True)
        ]
        return list(in_turns(of_methods))
