"""Whether the sidecars of a merge are of use to its method and its space, and what to say about those that are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mergekit_bayes.checkpoint.sidecar import SidecarMetadata
from mergekit_bayes.errors import MergekitBayesError, MethodError, MissingInputError, RecipeError, SidecarMismatchError
from mergekit_bayes.merge.inputs import Input
from mergekit_bayes.merge.registry import MergeMethod, methods_for_family
from mergekit_bayes.merge.setting import Setting
from mergekit_bayes.recipe import MergeRecipe


def sidecar_problems(method: MergeMethod, sources: Sequence[Input], space: str) -> Iterator[MergekitBayesError]:
    """Sidecars that the method or the space cannot use; none where precisions do not count.

    Args:
        method: the merge method.
        sources: the opened sources.
        space: what of adapters is merged.
    """
    for source in sources if method.precision != "unused" else ():
        if source.sidecar is None:
            continue
        metadata, where = source.sidecar.metadata, source.sidecar.path
        if metadata.family not in method.families:
            able = ", ".join(methods_for_family(metadata.family)) or "none"
            yield MethodError(
                f"{where}: holds precisions of the family {metadata.family}, which {method.name} cannot use; methods "
                f"that can: {able}; or leave it out with `precision: false`"
            )
        if metadata.space == "product" and space == "factor":
            yield SidecarMismatchError(
                f"{where}: describes the updates dW of an adapter, not its factors; expected precisions of factors for "
                "space: factor, or use space: product or full"
            )


def normalise_problems(setting: Setting) -> Iterator[MergekitBayesError]:
    """Why curvatures cannot be told from priors, where the recipe asks for the former to be normalised."""
    if not setting.recipe.precision.normalise:
        return
    place = ("precision", "normalise")
    if not setting.uses_precision:
        yield RecipeError(setting.recipe.describe(place, f"{setting.method.name} uses no precisions; remove it"))
    elif setting.space == "factor":
        yield RecipeError(setting.recipe.describe(place, "not in space: factor; expected product or full"))
    elif setting.needs_prior and setting.scalar_prior is None:
        why = "needs a scalar prior, not the base's sidecar; expected a number for precision.prior"
        yield RecipeError(setting.recipe.describe(place, why))
    for source in setting.sources if setting.needs_prior else ():
        if source.sidecar is not None and source.sidecar.metadata.prior_precision is None:
            yield MissingInputError(
                f"{source.sidecar.path}: prior_precision is not recorded, so its curvature cannot be told from its "
                "prior; expected it for precision.normalise, or normalise: false"
            )


def task_problems(recipe: MergeRecipe, method: MergeMethod) -> Iterator[MergekitBayesError]:
    """Tasks in a recipe whose method takes every model for a task of its own."""
    for index, source in enumerate(recipe.models if "mixture" not in method.families else ()):
        if source.task is not None:
            able = ", ".join(methods_for_family("mixture")) or "none"
            why = f"{method.name} does not merge several models of one task; methods that do: {able}"
            yield RecipeError(recipe.describe(("models", index, "task"), why))


def add_notes(setting: Setting) -> None:
    """Say what is legal but surprising: sources without precisions, sidecars that measure different things."""
    for label, names in setting.prior_only.items():
        setting.notes.append(
            f"{label}: no precision of its own for {len(names)} tensors (the first is {names[0]}); they get the prior's"
        )
    if not setting.uses_precision:
        return
    known = {source.label: source.sidecar.metadata for source in setting.sources if source.sidecar is not None}
    for label, metadata in known.items():
        centred = setting.needs_prior and setting.space == "full" and metadata.space == "full"
        if centred and metadata.prior_mean == "zero":
            setting.notes.append(f"{label}: its prior is centred on zero; the merge takes it as centred on the base")
    kinds = {(metadata.estimator, metadata.loss_unit, metadata.family) for metadata in known.values()}
    if len(kinds) > 1:
        shown = ", ".join(f"{label}: {_kind(metadata)}" for label, metadata in known.items())
        setting.notes.append(f"the sidecars are of different kinds, so their precisions may not compare ({shown})")


def _kind(metadata: SidecarMetadata) -> str:
    """Estimator, unit, family and number of units of a sidecar, in words."""
    family = "" if metadata.family == "diagonal" else f", {metadata.family}"
    count = f", {metadata.num_examples:,} units" if metadata.num_examples else ""
    return f"{metadata.estimator} per {metadata.loss_unit or 'unknown unit'}{family}{count}"
