"""Tables and figures of the study of fronts.

python -m evaluation.fronts.report [RESULTS.json]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

Results: TypeAlias = Mapping[str, Any]
MEASURES = ("hypervolume", "igd_plus", "error", "absolute_error")
HEADS = ("hypervolume", "IGD+ to real", "score - real", "size of that")
COLOURS = ("C7", "C0", "C2", "C3", "k")


def tables(results: Results) -> str:
    """For every group measures with intervals, differences, the weights to pick, and scores at every weight."""
    return "\n\n".join(part for found in results["groups"].values() for part in _group(found))


def _group(found: Results) -> list[str]:
    measures = [
        [row, *(_cell(values[name], sign=name == "error") for name in MEASURES)]
        for row, values in found["rows"].items()
    ]
    steps = [[f"{each['second']} - {each['first']}", _cell(each, sign=True)] for each in found["steps"]]
    return [
        f"### {' + '.join(found['tasks'])}",
        _table(["95% over seeds", *HEADS], measures),
        _table(["hypervolume, difference", "95% over seeds"], steps),
        _table(["best for the worst task", "weights, by seed", "regret in real training"], _picks(found)),
        _table([f"{' / '.join(found['tasks'])} at", *found["weights"]], _scores(found)),
    ]


def _picks(found: Results) -> list[list[str]]:
    return [[row, ", ".join(each["weights"]), _cell(each["regret"])] for row, each in found["picks"].items()]


def _scores(found: Results) -> list[list[str]]:
    rows = []
    for row, seeds in found["points"].items():
        cells = [np.mean([seed[weights] for seed in seeds], axis=0) for weights in found["weights"]]
        rows.append([row, *(" / ".join(f"{value:.2f}" for value in cell) for cell in cells)])
    return rows


def _cell(value: Results, *, sign: bool = False) -> str:
    plus = "+" if sign else ""
    ends = value["over_seeds"]
    shown = "" if ends is None else f" ({ends[0]:{plus}.3f} to {ends[1]:{plus}.3f})"
    return f"{value['mean']:{plus}.3f}{shown}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def figure(results: Results, path: Path) -> None:
    """Draw the fronts of pairs, averaged over seeds with the seeds behind them, and the volumes of all groups."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = list(results["groups"].values())
    pairs = [found for found in groups if len(found["tasks"]) == 2]
    count = len(pairs) + 1
    drawing, axes = pyplot.subplots(1, count, figsize=(4.4 * count, 4.2), layout="constrained", squeeze=False)
    for axis, found in zip(axes[0], pairs, strict=False):
        _front(axis, found)
    _volumes(axes[0][-1], groups)
    drawing.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    drawing.savefig(path, dpi=110)
    pyplot.close(drawing)


def _front(axis: Any, found: Results) -> None:
    experts = np.array(found["experts"])
    for colour, (row, seeds) in zip(COLOURS, found["points"].items(), strict=True):
        inside = np.array([[seed[weights] for weights in found["weights"]] for seed in seeds])
        axis.plot(*inside.reshape(-1, 2).T, ".", color=colour, alpha=0.3, ms=4)
        line = inside.mean(axis=0)
        axis.plot(*line.T, "o-", color=colour, ms=4, lw=1.5, label=row)
    axis.plot(*experts.mean(axis=0).T, "k*", ms=9)
    for start in (axis.axvline, axis.axhline):
        start(0, color="0.8", lw=0.8, zorder=0)
    first, second = found["tasks"]
    axis.set_xlabel(f"{first}: base 0, expert 1", fontsize=8)
    axis.set_ylabel(f"{second}: base 0, expert 1", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _volumes(axis: Any, groups: Sequence[Results]) -> None:
    for place, found in enumerate(groups):
        for index, (colour, values) in enumerate(zip(COLOURS, found["rows"].values(), strict=True)):
            at = place + 0.12 * (index - 2)
            volume = values["hypervolume"]
            axis.plot([at] * len(volume["seeds"]), volume["seeds"], ".", color=colour, alpha=0.5, ms=5)
            axis.plot(at, volume["mean"], "_", color=colour, ms=11, mew=2)
    axis.set_xticks(range(len(groups)), ["\n+ ".join(found["tasks"]) for found in groups], fontsize=8)
    axis.set_ylabel("hypervolume above the base", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results.json"
    print(tables(json.loads(given.read_text())))
