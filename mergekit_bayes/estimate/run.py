"""From a precision recipe to a sidecar beside the weights that it describes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_bayes.checkpoint.disk import format_bytes
from mergekit_bayes.errors import RecipeError
from mergekit_bayes.estimate.folder import SidecarFolder
from mergekit_bayes.estimate.from_rows import estimate_from_rows
from mergekit_bayes.estimate.from_state import estimate_from_state
from mergekit_bayes.estimate.request import Request
from mergekit_bayes.estimate.setup import make_accelerator
from mergekit_bayes.model import check_launch
from mergekit_bayes.model.trained import Trained, open_trained
from mergekit_bayes.recipe import PrecisionRecipe, load_recipe

if TYPE_CHECKING:
    from mergekit_bayes.data.read import Tables

__all__ = ["PrecisionResult", "estimate_precision", "target_of"]


@dataclass(frozen=True)
class PrecisionResult:
    """A finished pass.

    Attributes:
        folder: holds the sidecar, its report, and the figure if rows were looked at.
        report: the content of the report; empty in every process but the leading one.
    """

    folder: Path
    report: Mapping[str, Any]

    def summary(self) -> str:
        """What was estimated from what, for a terminal."""
        return "\n".join(_lines(self.folder, self.report)) if self.report else ""


def estimate_precision(
    recipe: PrecisionRecipe | Path | str | Mapping[str, Any],
    out: Path | str | None = None,
    *,
    overwrite: bool = False,
    progress: bool = False,
    recipe_dir: Path | None = None,
    tables: Tables | None = None,
) -> PrecisionResult:
    """Estimates the precision of a model or adapter and writes it as a sidecar.

    The sidecar appears when it is complete; the weights beside it are not touched. A run that was cut short goes on
    with the same call and ends with the bytes of one that was not. Under `torchrun` or `accelerate launch` every
    process calls this; what is found does not depend on their number, but for the order in which numbers are added.

    Args:
        recipe: path of a recipe, its content as a dictionary, or a loaded one.
        out: folder of the sidecar; wins over the recipe's `output.path`. By default that of the adapter or model.
        overwrite: replace a sidecar that lies there, once the new one is complete.
        progress: show on standard error how far it is.
        recipe_dir: folder that relative paths are tried from after the current one; by default the recipe's own.
        tables: data sets in memory (lists of mappings, or `datasets.Dataset`), by the path that stands for them in the
            recipe.

    Returns:
        The finished pass.

    Raises:
        RecipeError: the recipe cannot be read; every problem at once.
        MergekitBayesError: model, data, disk or numbers did not allow it; nothing existing was touched.
        KeyboardInterrupt: Ctrl-C; the same call goes on from what was saved.
    """
    loaded = recipe if isinstance(recipe, PrecisionRecipe) else load_recipe(recipe, expect=PrecisionRecipe)
    places = recipe_dir if recipe_dir is not None else loaded.folder
    accelerator = make_accelerator()
    check_launch()
    trained = open_trained(loaded.model.path, loaded.adapter, recipe_dir=places)
    target = target_of(loaded, trained, out)
    folder = SidecarFolder(target, overwrite=overwrite)
    folder.check()
    request = Request(loaded, trained, folder, accelerator, places, tables, show=progress)
    estimate = estimate_from_state if loaded.estimator.name == "adam" else estimate_from_rows
    return PrecisionResult(target, estimate(request))


def target_of(recipe: PrecisionRecipe, trained: Trained, out: Path | str | None) -> Path:
    """Returns the folder that the sidecar goes to.

    Raises:
        RecipeError: none was named, and the weights lie in the hub's cache.
    """
    named = out if out is not None else recipe.output.path
    if named is not None:
        return Path(named)
    if not trained.local:
        what = "adapter" if trained.adapter is not None else "model"
        hint = f"missing; the {what} is of the hub: name a folder there, or after the recipe on the command line."
        raise RecipeError(recipe.describe(("output", "path"), hint))
    return trained.folder


def _lines(folder: Path, report: Mapping[str, Any]) -> Iterator[str]:
    estimator, rows = report["estimator"]["name"], report["rows"]
    size = format_bytes(sum(file["bytes"] for file in report["files"].values()))
    yield f"{folder}: {report['family']} precision of {report['tensors']['described']} tensors by {estimator}, {size}"
    units = report["units"]
    if rows is not None:
        seen = f"{units['seen']:,} {units['unit']}s in {rows['seen']:,} rows"
        yield f"  {seen}, scaled to N = {units['num_examples']:,}"
    moved = [series[-1]["median"] for series in report["convergence"].values() if series]
    if moved:
        yield f"  moved by {max(moved):.1%} over the last half of the rows"
    yield from (f"  note: {note}" for note in report["notes"])
