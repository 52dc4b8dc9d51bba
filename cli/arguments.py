"""Arguments that several verbs take, and the recipe they name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

if TYPE_CHECKING:
    from mergekit_bayes.recipe import AnyRecipe

Recipe: TypeAlias = Annotated[Path, typer.Argument(help="YAML file that says what to do.", show_default=False)]
Out: TypeAlias = Annotated[
    Path | None,
    typer.Argument(help="Output folder; wins over the recipe's output.path.", show_default=False),
]
Changes: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change the recipe, as in `models[0].parameters.weight=0.3`; may be repeated.",
        show_default=False,
    ),
]


def number_of_bytes(text: str) -> int:
    """`512MB` or `2GiB` as a number of bytes."""
    from mergekit_bayes.recipe.field import size
    from mergekit_bayes.recipe.problem import Refusal

    try:
        return size(text if not text.isdecimal() else int(text))
    except Refusal as error:
        raise typer.BadParameter(str(error)) from None


def given_only(**options: object) -> dict[str, object]:
    """The options that the command line sets."""
    return {name: value for name, value in options.items() if value is not None}


def refuse_options(kind: str, options: Mapping[str, object], instead: str) -> None:
    """Refuse options that recipes of a kind have no use for.

    Args:
        kind: the recipe's kind.
        options: those that were given.
        instead: a sentence about what does what they are for.

    Raises:
        BadParameter: there is one.
    """
    if options:
        name = "--" + next(iter(options)).replace("_", "-")
        raise typer.BadParameter(f"recipes of kind `{kind}` have no use for it; {instead}", param_hint=f"'{name}'")


def load(path: Path, changes: list[str] | None) -> AnyRecipe:
    """The checked recipe, of whatever kind.

    Args:
        path: the recipe's file.
        changes: `key.path=value`, as given to `--set`.

    Raises:
        RecipeError: with every problem of it.
    """
    from mergekit_bayes.merge.schemas import method_schemas
    from mergekit_bayes.recipe import load_recipe

    return load_recipe(path, methods=method_schemas(), overrides=changes or ())
