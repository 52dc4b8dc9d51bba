"""Results as tables for a terminal: one for each data set, a row for each model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mergekit_bayes.evaluate.harness_table import harness_table

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["WORDS", "print_results", "tables_of"]

WORDS: Mapping[str, str] = {
    "loss": "loss (nats per token)",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "accuracy": "accuracy",
    "normalised_accuracy": "accuracy per byte",
    "nll": "nll (nats)",
    "ece": "ece",
    "brier": "brier",
}
"""What headings call metrics."""

_OFF_TERMINAL = 200


def print_results(content: Mapping[str, Any]) -> None:
    """Prints tables and notes to standard output."""
    import sys

    from rich.console import Console

    # off a terminal nothing is cut or wrapped: the table is for grep then
    console = Console(width=None if sys.stdout.isatty() else _OFF_TERMINAL, highlight=False)
    for line, table in tables_of(content):
        console.print(line, markup=False, soft_wrap=True)
        console.print(table)
    if "lm_eval" in content:
        console.print(f"lm-eval-harness {content['lm_eval_version']}, at the mean", markup=False, soft_wrap=True)
        console.print(harness_table(content))
    for note in content["notes"]:
        console.print(f"note: {note}", markup=False, soft_wrap=True)


def tables_of(content: Mapping[str, Any]) -> Iterator[tuple[str, Table]]:
    """Yields a table for each data set with the line above it.

    Below a score stands how far it is from the baseline's, and the interval of that.

    Args:
        content: of `results.json`.
    """
    from rich import box
    from rich.table import Table

    for data in content["data"]:
        name = data["name"]
        rows = {title: found[name] for title, found in content["scores"].items()}
        metrics = list(dict.fromkeys(metric for found in rows.values() for metric in found))
        level = f"{content['intervals']['level']:.0%}"
        below = f"; second lines: difference from {content['baseline']}, {level} interval" if len(rows) > 1 else ""
        table = Table(box=box.SIMPLE, show_edge=False)
        table.add_column("model", no_wrap=True)
        for metric in metrics:
            table.add_column(heading(metric), justify="right")
        for model, found in rows.items():
            differences = content["differences"].get(model, {}).get(name, {})
            table.add_row(_plain(model), *(_cell(found.get(metric), differences.get(metric)) for metric in metrics))
        yield f"{name}: {data['rows']:,} rows{below}", table


def heading(metric: str) -> str:
    """What tables and figures call a metric."""
    base, _, share = metric.partition("@")
    return f"accuracy of surest {float(share):.0%}" if share else WORDS[base]


def _cell(score: Mapping[str, Any] | None, difference: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    text = _number(score["value"])
    if difference is None or difference["low"] is None:
        return text
    low, high = difference["low"], difference["high"]
    told = f"{difference['difference']:+.4f} \\[{low:+.4f}, {high:+.4f}]"
    if low <= 0 <= high:
        return f"{text}\n[dim]{told}[/]"
    return f"{text}\n[{'green' if (low > 0) == difference['higher_is_better'] else 'red'}]{told}[/]"


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"


def _plain(text: str) -> str:
    """A name as rich prints it unchanged."""
    return text.replace("[", "\\[")
