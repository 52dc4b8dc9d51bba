"""The command line as a whole: verbs, the default verb, version, exit codes.

0    done
2    the recipe, the inputs or the command line are not right; one message, nothing was changed
130  interrupted
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from .diagnose import diagnose
from .evaluate import evaluate
from .inspect import inspect
from .methods import methods
from .pick import pick
from .plan import plan
from .run import run

VERBS: dict[str, Callable[..., None]] = {
    "run": run,
    "plan": plan,
    "pick": pick,
    "evaluate": evaluate,
    "diagnose": diagnose,
    "methods": methods,
    "inspect": inspect,
}
"""Every verb and its function; any other first word is a recipe to run."""

KINDS = ("merge", "finetune", "precision", "preview")
"""Kinds of recipe that are no verbs."""

app = typer.Typer(
    name="bayes-merge",
    add_completion=False,
    no_args_is_help=True,
    subcommand_metavar="RECIPE [OUT] | COMMAND ...",
    rich_markup_mode=None,  # plain help and errors: boxes break `file:line:column` at the edge of the terminal
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
for _name, _verb in VERBS.items():
    app.command(_name)(_verb)


def _print_version(wanted: bool) -> None:
    if wanted:
        from mergekit_bayes import __version__

        print(f"bayes-merge {__version__}")
        raise typer.Exit()


@app.callback(epilog="`bayes-merge RECIPE [OUT]` is short for `bayes-merge run RECIPE [OUT]`.")
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tune and merge models as posteriors: a mean and a precision for every weight."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; always ends by raising SystemExit with the exit code.

    Args:
        arguments: without the program's name; None takes those of the process.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given and given[0] not in (*VERBS, "-h", "--help", "--version"):
        _refuse_misspelt_verb(given[0])
        given.insert(0, "run")
    app(given, prog_name="bayes-merge")


def _refuse_misspelt_verb(word: str) -> None:
    if Path(word).exists():
        return
    near = difflib.get_close_matches(word, VERBS, n=1, cutoff=0.7)
    if word in KINDS:
        hint = "The recipe itself says its kind: `bayes-merge RECIPE [OUT]`."
    elif near:
        hint = f"Did you mean `bayes-merge {near[0]}`?"
    else:
        return
    print(f"{word}: no such recipe. {hint}", file=sys.stderr)
    raise SystemExit(2)
