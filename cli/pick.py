"""`bayes-merge pick PREVIEW`: the merge recipe of one point of a preview's front."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .failure import exit_codes


def pick(  # noqa: PLR0913  (one argument per option)
    preview: Annotated[Path, typer.Argument(help="Folder of a preview.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Argument(help="File to write the recipe to; standard output without one.", show_default=False),
    ] = None,
    *,
    max_min: Annotated[bool, typer.Option("--max-min", help="The point whose worst task is best.")] = False,
    knee: Annotated[bool, typer.Option("--knee", help="The point from which a little less gains least.")] = False,
    at_least: Annotated[
        str | None,
        typer.Option(
            metavar="TASK=SHARE,...",
            help="Of the points that keep such a share of each expert's gain, the one with the best mean.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(metavar="W1,W2,...", help="The mix of these weights, looked at or not.", show_default=False),
    ] = None,
    method: Annotated[str | None, typer.Option(help="Only points of this method.", show_default=False)] = None,
    tier: Annotated[
        str | None,
        typer.Option(help="What scores come from: evaluated, fitted, surrogate.", show_default="the best there is"),
    ] = None,
) -> None:
    """Write the merge recipe of one point of a preview."""
    given = [max_min, knee, at_least is not None, weights is not None]
    if sum(given) != 1:
        raise typer.BadParameter("expected one of --max-min, --knee, --at-least and --weights")
    with exit_codes():
        from mergekit_bayes.preview import pick as picking

        choice = picking.Choice(preview, tier=tier, method=method)
        if weights is not None:
            found = picking.pick_weights(choice, [_number(text, "--weights") for text in weights.split(",")], method)
        elif at_least is not None:
            found = picking.pick_at_least(choice, _shares(at_least))
        else:
            found = picking.pick_max_min(choice) if max_min else picking.pick_knee(choice)
        text = picking.recipe_text(choice, found)
        if out is None:
            print(text, end="")
        else:
            from mergekit_bayes.checkpoint.disk import disk_errors

            with disk_errors(out, "write"):
                out.write_text(text, encoding="utf-8")


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number", param_hint=f"'{option}'") from None


def _shares(text: str) -> dict[str, float]:
    found = {}
    for part in text.split(","):
        task, equals, share = part.rpartition("=")
        if not equals:
            raise typer.BadParameter(f"{part!r}: expected TASK=SHARE", param_hint="'--at-least'")
        found[task.strip()] = _number(share, "--at-least")
    return found
