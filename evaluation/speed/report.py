"""Tables, verdicts and the figure, from the results alone.

python -m evaluation.speed.report [results.json]      print the tables of an earlier run
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

Results = Mapping[str, Any]
MIB = 1 << 20


def middle(runs: Sequence[Mapping[str, float]], key: str = "seconds") -> float:
    """Median over runs."""
    return median(run[key] for run in runs)


def throughput(runs: Sequence[Mapping[str, float]]) -> float:
    """Median bytes read and written per second."""
    return median((run["bytes_read"] + run["bytes_written"]) / run["seconds"] for run in runs)


def verdicts(results: Results) -> list[dict[str, Any]]:
    """What is promised, what was measured, and whether it holds."""
    start, against = results["start"]["runs"], results["mergekit"]["runs"]
    ours = {name: runs for name, runs in against.items() if name.startswith("mergekit_bayes")}
    anonymous = [middle(runs, "peak_anonymous") for runs in ours.values()]
    small = against["mergekit_bayes, 2 sources"]
    found = []
    for filesystem, streaming in results["streaming"].items():
        copied = _ratio(streaming["runs"], "compiled", "cp")
        plain = _ratio(streaming["runs"], "not compiled", "plain expression")
        found.append(_at_least(f"{filesystem}: compiled, throughput over that of cp", copied, 0.5))
        found.append(_at_least(f"{filesystem}: not compiled, throughput over the plain expression's", plain, 3))
    found += [
        _at_most("peak RSS, MiB", middle(small, "peak_rss") / MIB, 700),
        _at_most("peak anonymous memory, largest over smallest", max(anonymous) / min(anonymous), 1.1),
    ]
    if "mergekit, 2 sources" in against:
        times = middle(against["mergekit, 2 sources"]) / middle(small)
        found.append(_at_least("whole process, mergekit's time over ours", times, 4))
    found.append(_at_most("bayes-merge --help, seconds", middle(start["bayes-merge --help"]), 0.5))
    return found


def _ratio(runs: Mapping[str, Sequence[Mapping[str, float]]], first: str, second: str) -> float:
    return throughput(runs[first]) / throughput(runs[second])


def _at_least(what: str, measured: float, wanted: float) -> dict[str, Any]:
    return {"what": what, "measured": measured, "wanted": f">= {wanted}", "holds": measured >= wanted}


def _at_most(what: str, measured: float, wanted: float) -> dict[str, Any]:
    return {"what": what, "measured": measured, "wanted": f"<= {wanted}", "holds": measured <= wanted}


def tables(results: Results) -> str:
    """The results as Markdown."""
    streaming = [_streaming(name, part["runs"]) for name, part in results["streaming"].items()]
    rest = [_mergekit(results), _starting(results), _verdicts(results), _conditions(results)]
    return "\n\n".join([*streaming, *rest])


def _streaming(filesystem: str, runs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    rows = []
    for name, each in runs.items():
        first = [run["first_seconds"] - run["seconds"] for run in each if "first_seconds" in run]
        # the very first run of all meets an empty compiler cache
        compiler = f"{first[0]:.1f} / {median(first[1:] or first):.1f}" if name == "compiled" else ""
        anonymous = f"{middle(each, 'peak_anonymous') / MIB:.0f}" if "peak_anonymous" in each[0] else ""
        gigabytes = (each[0]["bytes_read"] + each[0]["bytes_written"]) / 1e9
        rows.append(
            (
                name,
                f"{gigabytes:.2f}",
                f"{middle(each):.2f}",
                f"{throughput(each) / 1e9:.2f}",
                f"{_ratio(runs, name, 'cp'):.2f}",
                f"{_ratio(runs, name, 'plain expression'):.1f}",
                anonymous,
                compiler,
            )
        )
    head = (
        f"gradient matching, 3 sources, on {filesystem}",
        "GB read + written",
        "seconds",
        "GB/s",
        "of `cp`",
        "of plain",
        "peak anonymous, MiB",
        "compiler, s (cold / cached)",
    )
    return _table(head, rows)


def _mergekit(results: Results) -> str:
    rows = [
        (
            name,
            f"{middle(runs):.2f}",
            f"{middle(runs, 'peak_rss') / MIB:.0f}",
            f"{middle(runs, 'peak_anonymous') / MIB:.0f}",
        )
        for name, runs in results["mergekit"]["runs"].items()
    ]
    head = ("task arithmetic, whole process", "seconds", "peak RSS, MiB", "peak anonymous, MiB")
    return _table(head, rows)


def _starting(results: Results) -> str:
    rows = [(f"`{name}`", f"{middle(runs):.2f}") for name, runs in results["start"]["runs"].items()]
    return _table(("until the prompt is back", "seconds"), rows)


def _verdicts(results: Results) -> str:
    rows = [
        (
            verdict["what"],
            f"{verdict['measured']:.2f}",
            verdict["wanted"],
            "yes" if verdict["holds"] else "NO",
        )
        for verdict in results["verdicts"]
    ]
    return _table(("promise", "measured", "wanted", "holds"), rows)


def _conditions(results: Results) -> str:
    machine = results["machine"]
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; Linux "
        f"{machine['kernel']}, Python {machine['python']}, torch {machine['torch']}; {results['date']}; "
        f"load before the run {machine['load_at_start']:.1f}.\n`{results['command']}`"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def figure(results: Results, path: Path) -> None:
    """Draw throughput, wall time and memory side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    against = results["mergekit"]["runs"]
    panels = (
        *(
            (
                f"throughput on {filesystem}, GB/s\n(gradient matching, 3 sources with precisions)",
                {name: throughput(runs) / 1e9 for name, runs in streaming["runs"].items()},
            )
            for filesystem, streaming in results["streaming"].items()
        ),
        (
            "whole process, seconds\n(task arithmetic)",
            {name: middle(runs) for name, runs in against.items()},
        ),
        (
            "peak anonymous memory, MiB\n(task arithmetic)",
            {name: middle(runs, "peak_anonymous") / MIB for name, runs in against.items()},
        ),
    )
    drawing, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 3.4), layout="constrained")
    for axis, (title, values) in zip(axes, panels, strict=True):
        names = list(values)[::-1]
        mine = {"compiled", "not compiled"}
        colours = ["C0" if name in mine or name.startswith("mergekit_bayes") else "0.7" for name in names]
        bars = axis.barh(names, [values[name] for name in names], color=colours)
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axis.set_title(title, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    drawing.savefig(path, dpi=130)
    pyplot.close(drawing)


if __name__ == "__main__":
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results.json"
    print(tables(json.loads(given.read_text())))
