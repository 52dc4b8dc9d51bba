"""From the front of a preview to the merge recipe of one point of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mergekit_bayes.errors import RecipeError
from mergekit_bayes.merge.schemas import method_schemas
from mergekit_bayes.preview.folder import RECIPE_NAME, read_front
from mergekit_bayes.preview.front import knee, max_min
from mergekit_bayes.preview.results import TIERS
from mergekit_bayes.recipe import dump_yaml, load_recipe
from mergekit_bayes.recipe.preview import PreviewRecipe

__all__ = ["Choice", "pick_at_least", "pick_knee", "pick_max_min", "pick_weights", "recipe_text"]


class Choice:
    """The points of a preview that can be picked.

    Args:
        folder: of a preview.
        tier: what scores come from; None for the most trusted there is.
        method: only points of this method; None for all.

    Raises:
        RecipeError: there is no such preview, tier or method, or nothing to pick.
    """

    def __init__(self, folder: Path, *, tier: str | None = None, method: str | None = None) -> None:
        self.folder = folder
        self.front = read_front(folder)
        there = [each for each in TIERS if each in self.front["tiers"]]
        if tier is not None and tier not in there:
            raise RecipeError(f"--tier {tier}: this preview has {', '.join(there) or 'none'}")
        if method is not None and method not in self.front["methods"]:
            raise RecipeError(f"--method {method}: this preview has {', '.join(self.front['methods'])}")
        if not there:
            raise RecipeError(f"{folder}: no mix has scores; nothing can be picked")
        self.tier = tier or there[0]
        self.tasks = [task["name"] for task in self.front["tasks"]]
        self.points: list[dict[str, Any]] = [
            point
            for point in self.front["points"]
            if self.tier in point
            and (method is None or point["method"] == method)
            and all(value is not None for value in point[self.tier]["normalised"].values())
        ]
        if not self.points:
            raise RecipeError(f"{folder}: no mix of {method or 'any method'} has all its scores; nothing can be picked")

    @property
    def gains(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Scores of the points on the scale of base and experts, shape (points, tasks)."""
        rows = [[point[self.tier]["normalised"][task] for task in self.tasks] for point in self.points]
        return np.array(rows, dtype=np.float64)


Picked = dict[str, Any]
"""A point: `method`, `weights`, and scores by tier."""


def pick_max_min(choice: Choice) -> Picked:
    """The point whose worst task is best."""
    place = max_min(choice.gains)
    assert place is not None  # a choice has points, all with scores
    return choice.points[place]


def pick_knee(choice: Choice) -> Picked:
    """The point from which giving up a little in any task gains least."""
    place = knee(choice.gains)
    assert place is not None
    return choice.points[place]


def pick_at_least(choice: Choice, wanted: Mapping[str, float]) -> Picked:
    """Of the points that keep at least so much of each expert's gain, the one with the best mean.

    Args:
        choice: the points.
        wanted: by task, on the scale where 0 is the base and 1 the expert.

    Raises:
        RecipeError: a task that is none, or no point that keeps so much.
    """
    unknown = [task for task in wanted if task not in choice.tasks]
    if unknown:
        raise RecipeError(f"--at-least {unknown[0]}: no such task; there are {', '.join(choice.tasks)}")
    gains = choice.gains
    columns = [choice.tasks.index(task) for task in wanted]
    short = np.maximum(np.array(list(wanted.values())) - gains[:, columns], 0).max(axis=1)
    allowed = np.flatnonzero(short <= 0)
    if not len(allowed):
        asked = ", ".join(f"{task}={value:g}" for task, value in wanted.items())
        nearest = int(np.argmin(short))
        reached = ", ".join(
            f"{task}={gains[nearest, column]:.3f}" for task, column in zip(wanted, columns, strict=True)
        )
        raise RecipeError(
            f"--at-least {asked}: none of {len(gains)} mixes keeps so much; the nearest has {reached} "
            f"({choice.points[nearest]['method']} at {_weights(choice.points[nearest])}); ask for less, or preview more"
        )
    return choice.points[int(allowed[np.argmax(gains[allowed].mean(axis=1))])]


def pick_weights(choice: Choice, weights: Sequence[float], method: str | None) -> Picked:
    """The mix of given weights, whether it was looked at or not.

    Raises:
        RecipeError: not one weight per model, or no method named where there are several.
    """
    models = choice.front["models"]
    if len(weights) != len(models):
        raise RecipeError(f"--weights: {len(weights)} for {len(models)} models; expected one for each of {models}")
    if method is None and len(choice.front["methods"]) > 1:
        raise RecipeError(f"--weights: say which --method: {', '.join(choice.front['methods'])}")
    chosen = method or choice.front["methods"][0]
    for point in choice.points:
        same = all(math.isclose(a, b, abs_tol=1e-9) for a, b in zip(point["weights"], weights, strict=True))
        if point["method"] == chosen and same:
            return point
    return {"method": chosen, "weights": list(weights)}


def recipe_text(choice: Choice, picked: Picked) -> str:
    """The merge recipe of a point, as YAML with what is known of it in a comment.

    Raises:
        RecipeError: the preview's own recipe cannot be read.
    """
    folder = choice.folder if choice.folder.is_dir() else choice.folder.parent
    recipe = load_recipe(folder / RECIPE_NAME, expect=PreviewRecipe, methods=method_schemas())
    spec = next((each for each in recipe.compared if each.title == picked["method"]), None)
    if spec is None:
        raise RecipeError(f"{folder / RECIPE_NAME}: has no method {picked['method']}, which {folder} has points of")
    content = recipe.merge_of(spec, picked["weights"])
    merge = load_recipe(_found(content, choice.front.get("recipe_dir")), methods=method_schemas())
    known = picked.get(choice.tier, {}).get("normalised", {})
    head = f"# {picked['method']} at {_weights(picked)}, from {folder.name}"
    scores = ", ".join(f"{task} {gain:.3f}" for task, gain in known.items())
    lines = [head, f"# {choice.tier}, 0 is the base and 1 the expert: {scores}" if scores else "# not looked at"]
    return "\n".join(lines) + "\n" + dump_yaml(merge.resolved())


def _weights(point: Picked) -> str:
    return ", ".join(f"{weight:g}" for weight in point["weights"])


def _found(content: Mapping[str, Any], recipe_dir: str | None) -> dict[str, Any]:
    """The recipe with paths that were relative to the preview's recipe written from there."""

    def located(reference: object) -> object:
        if not isinstance(reference, str) or recipe_dir is None or Path(reference.split("+")[0]).exists():
            return reference
        beside = Path(recipe_dir) / reference
        return str(beside) if Path(str(beside).split("+")[0]).exists() else reference

    models = [{**source, "model": located(source["model"])} for source in content["models"]]
    return {**content, "base_model": located(content["base_model"]), "models": models}
