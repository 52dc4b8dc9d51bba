"""What lm-eval-harness found as a table for a terminal: a row for each metric of a task, a column for each model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["harness_table"]


def harness_table(content: Mapping[str, Any]) -> Table:
    """The table of all tasks; behind every value its standard error, behind every metric which way is better.

    Args:
        content: of `results.json`, with `lm_eval`.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, show_edge=False)
    for heading in ("task", "metric"):
        table.add_column(heading, no_wrap=True)
    for title in content["lm_eval"]:
        table.add_column(title.replace("[", "\\["), justify="right")
    models = list(content["lm_eval"].values())
    for task, metrics in models[0].items():
        for metric, score in metrics.items():
            mark = {True: " ↑", False: " ↓"}.get(score["higher_is_better"], "")
            table.add_row(task, metric + mark, *(_cell(found[task][metric]) for found in models))
    return table


def _cell(score: Mapping[str, Any]) -> str:
    value, stderr = score["value"], score["stderr"]
    text = "not finite" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"
    return text if stderr is None else f"{text} ± {stderr:.4f}"
