"""Tables and the figure of the study of adaptive designs.

python -m evaluation.adaptive.report [RESULTS.json]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

Results: TypeAlias = Mapping[str, Any]
WAYS = ("adaptive", "spread", "grid", "random")
COLOURS = {"adaptive": "C3", "spread": "C0", "grid": "C2", "random": "0.6"}


def tables(results: Results) -> str:
    """Medians over problems for every design and budget, and every problem."""
    cases = _cases(results)
    summary = [[*_named(key), *_medians(rows), *_wins(rows)] for key, rows in cases.items()]
    each = [
        [name, row["design"], str(row["budget"]), *(_percent(row["missed"].get(way)) for way in WAYS)]
        for name, rows in results["problems"].items()
        for row in rows
    ]
    return "\n\n".join(
        [
            _table(["tasks", "design", "budget", *WAYS, "better than spread", "better than grid"], summary),
            _table(["problem", "design", "budget", *WAYS], each),
        ]
    )


def _cases(results: Results) -> dict[tuple[int, str, int], list[Results]]:
    """The rows of all problems with as many tasks, by design and budget."""
    found: dict[tuple[int, str, int], list[Results]] = {}
    for name, rows in results["problems"].items():
        for row in rows:
            found.setdefault((name.count("+") + 1, row["design"], row["budget"]), []).append(row)
    return found


def _named(key: tuple[int, str, int]) -> list[str]:
    return [str(part) for part in key]


def _medians(rows: Sequence[Results]) -> list[str]:
    return [_percent(_median([row["missed"].get(way) for row in rows])) for way in WAYS]


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _wins(rows: Sequence[Results]) -> list[str]:
    """How often adapting misses less than another way."""
    cells = []
    for way in ("spread", "grid"):
        pairs = [(row["missed"]["adaptive"], row["missed"][way]) for row in rows if way in row["missed"]]
        cells.append(f"{sum(ours < theirs for ours, theirs in pairs)} of {len(pairs)}" if pairs else "-")
    return cells


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}%"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def figure(results: Results, path: Path) -> None:
    """Draw what every way misses against its budget: one panel per number of tasks and design."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = _cases(results)
    panels = list(dict.fromkeys(key[:2] for key in cases))
    drawing, axes = pyplot.subplots(
        1, len(panels), figsize=(3.6 * len(panels), 3.4), layout="constrained", squeeze=False, sharey=True
    )
    for axis, (tasks, design) in zip(axes[0], panels, strict=True):
        own = {key[2]: rows for key, rows in cases.items() if key[:2] == (tasks, design)}
        _missed(axis, own)
        axis.set_title(f"{tasks} tasks, {design}", fontsize=9)
        axis.set_xlabel("evaluated mixes", fontsize=8)
    axes[0][0].set_ylabel("hypervolume missed, % of the whole design's", fontsize=8)
    drawing.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    drawing.savefig(path, dpi=110)
    pyplot.close(drawing)


def _missed(axis: Any, by_budget: Mapping[int, Sequence[Results]]) -> None:
    for way in WAYS:
        known = {
            budget: [row["missed"][way] for row in rows if way in row["missed"]] for budget, rows in by_budget.items()
        }
        known = {budget: values for budget, values in known.items() if values}
        for budget, values in known.items():
            axis.plot(
                [budget] * len(values), [100 * value for value in values], ".", color=COLOURS[way], alpha=0.35, ms=5
            )
        if known:
            axis.plot(
                list(known), [100 * median(values) for values in known.values()], "o-", color=COLOURS[way], label=way
            )
    axis.set_ylim(bottom=0)
    axis.set_xticks(list(by_budget), [str(budget) for budget in by_budget])
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results.json"
    print(tables(json.loads(given.read_text())))
