"""Tables and figures of the results; nothing is computed here."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Results = Mapping[str, Any]

WAYS = {"full": "full fine-tuning", "lora": "LoRA, r = 8"}


def tables(results: Results) -> str:
    """An overview; then every family and way of training: scores, differences, and what was tuned."""
    parts = [overview(results)]
    for family, found in sorted(results.items()):
        for mode, way in WAYS.items():
            if mode in found:
                parts += [f"### {family}, {way}", _normalised(found[mode]), _raw(found[mode])]
                parts += [_differences(found[mode]), _knobs(found[mode])]
    return "\n\n".join(parts)


def overview(results: Results) -> str:
    """One column per family and way of training: the average, and the share of the way to joint training."""
    columns = {
        f"{family}, {mode}": found[mode] for family, found in sorted(results.items()) for mode in WAYS if mode in found
    }
    names = max((list(found["rows"]) for found in columns.values()), key=len)
    rows = [[name, *(_short(found["rows"].get(name)) for found in columns.values())] for name in names]
    return _table(["average (way to joint)", *columns], rows)


def _short(row: Results | None) -> str:
    if row is None:
        return "-"
    way = "" if row["way_to_joint"] is None else f" ({row['way_to_joint']:+.2f})"
    return f"{row['average']:.2f}{way}"


def _normalised(found: Results) -> str:
    tasks = found["tasks"]
    rows = [
        [
            name,
            *(f"{row['normalised'][task]:.2f}" for task in tasks),
            f"**{row['average']:.3f}**",
            _interval(row["over_seeds"]),
            _interval(row["over_examples"]),
            f"{row['pooled']:.3f}",
            _interval(row["pooled_over_seeds"]),
            "-" if row["way_to_joint"] is None else f"{row['way_to_joint']:.2f}",
            _interval(row["way_over_seeds"], 2),
        ]
        for name, row in found["rows"].items()
    ]
    ends = "95% over seeds"
    head = ["normalised", *tasks, "average", ends, "95% over examples", "pooled", ends, "way to joint", ends]
    return _table(head, rows)


def _raw(found: Results) -> str:
    tasks = found["tasks"]
    rows = [
        [name, *(f"{row['raw'][task]:.3f}" for task in tasks), f"{sum(row['raw'].values()) / len(tasks):.3f}"]
        for name, row in found["rows"].items()
    ]
    return _table(["raw", *tasks, "average"], rows)


def _differences(found: Results) -> str:
    rows = [
        [f"{each['second']} - {each['first']}", f"{each['difference']:+.3f}", _interval(each["over_seeds"], sign=True)]
        for each in found["differences"]
    ]
    return _table(["difference of averages", "", "95% over seeds"], rows)


def _knobs(found: Results) -> str:
    rows = [
        [
            name,
            each["knob"],
            f"{each['chosen']:g}",
            ", ".join(f"{at}: {value:.3f}" for at, value in each["tried"].items()),
        ]
        for name, each in found["knobs"].items()
        if each["tried"]
    ]
    return _table(["tuned", "knob", "chosen", "average normalised score on the tuning data of the first seed"], rows)


def _interval(ends: Sequence[float] | None, digits: int = 3, *, sign: bool = False) -> str:
    plus = "+" if sign else ""
    return "-" if ends is None else f"{ends[0]:{plus}.{digits}f} to {ends[1]:{plus}.{digits}f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def figure(name: str, found: Results, path: Path) -> None:
    """Draw the average normalised score of every method, with its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    modes = [mode for mode in WAYS if mode in found]
    rows = max((list(found[mode]["rows"]) for mode in modes), key=len)  # no way of training has a row of its own
    size = (4.2 * len(modes) + 1, 0.8 + 0.3 * len(rows))
    drawing, axes = pyplot.subplots(1, len(modes), figsize=size, layout="constrained", squeeze=False, sharey=True)
    for axis, mode in zip(axes[0], modes, strict=True):
        _dots(axis, found[mode]["rows"], rows)
        axis.set_title(f"{name}, {WAYS[mode]}", fontsize=9)
    axes[0][0].set_yticks(range(len(rows)), rows, fontsize=8)
    axes[0][0].invert_yaxis()
    drawing.savefig(path, dpi=110)
    pyplot.close(drawing)


def _dots(axis: Any, rows: Results, names: Sequence[str]) -> None:
    lowest = min(-0.1, rows["linear"]["average"] - 0.6)  # what is below is drawn as an arrow at the edge
    for name, row in rows.items():
        place = names.index(name)
        if row["average"] < lowest:
            axis.plot(lowest, place, "<", color="C0", ms=6)
            continue
        axis.plot(row["seeds"], [place] * len(row["seeds"]), "o", color="C0", alpha=0.5, ms=4)
        axis.plot(row["average"], place, "|", color="C0", ms=13, mew=2)
    for reference, style in (("linear", ":"), ("joint training", "--")):
        axis.axvline(rows[reference]["average"], color="0.7", ls=style, lw=1, zorder=0)
    axis.set_xlabel("score normalised to the experts (base 0, experts 1)", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results.json"
    print(tables(json.loads(given.read_text())))
