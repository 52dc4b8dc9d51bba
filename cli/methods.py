"""`bayes-merge methods [NAME]`: the merge methods there are, or one of them in full."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from .failure import exit_codes

if TYPE_CHECKING:
    from rich.table import Table

    from mergekit_bayes.merge.registry import MergeMethod


def methods(
    name: Annotated[str | None, typer.Argument(help="Explain one method.", show_default=False)] = None,
) -> None:
    """List the merge methods, or explain one of them."""
    with exit_codes():
        from mergekit_bayes.merge.registry import get_method
        from mergekit_bayes.merge.registry import methods as all_methods

        if name is not None:
            print(_explained(get_method(name)))
            return
        from rich.console import Console

        # off a terminal nothing is cut or wrapped: the table is for grep then
        console = Console(width=None if sys.stdout.isatty() else 200)
        console.print(_table(all_methods()))


def _table(found: tuple[MergeMethod, ...]) -> Table:
    from rich import box
    from rich.table import Table

    table = Table("method", "needs", "parameters (default)", "paper", box=box.SIMPLE, show_edge=False)
    for method in found:
        names = "\n".join([f"[bold]{method.name}[/]", *(f"[dim]= {alias}[/]" for alias in method.aliases)])
        table.add_row(names, ", ".join(_needs(method)), "\n".join(_parameters(method)), method.paper)
    return table


def _needs(method: MergeMethod) -> list[str]:
    uses = {"base": method.base, "precision": method.precision, "prior": method.prior}
    marks = {"required": "", "optional": " (optional)"}
    return [f"{what}{marks[use]}" for what, use in uses.items() if use in marks] or ["means only"]


def _parameters(method: MergeMethod) -> list[str]:
    return ["weight", *(f"{p.name} ({_yaml(p.default)})" for p in method.parameters)]


def _explained(method: MergeMethod) -> str:
    import inspect

    lines = [f"{method.name}   ({method.paper})", f"needs: {', '.join(_needs(method))}"]
    if method.aliases:
        lines.append(f"also called: {', '.join(method.aliases)}")
    lines += ["parameters:", "  weight: mixing coefficient of a source"]
    for p in method.parameters:
        only = f"; only {_yaml(p.only)} is supported" if p.only is not None else ""
        lines.append(f"  {p.name} = {_yaml(p.default)}: {p.help}{only}")
    return "\n".join([*lines, "", inspect.getdoc(method.kernel) or ""])


def _yaml(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else f"{value}"
