"""Tables and figures of the results; nothing is computed here but means."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Results = dict[str, Any]

CURVES = ("AdamW, mean", "IVON, mean", "IVON, samples, chosen")


def tables(results: Results) -> str:
    """Every experiment: scores by variant, then differences with their intervals."""
    return "\n\n".join(_experiment(name, found) for name, found in sorted(results.items()))


def _experiment(name: str, found: Results) -> str:
    unit = "tokens" if found["task"] == "causal_lm" else "examples"
    seeds = len({run["seed"] for run in found["runs"]})
    about = (
        f"{seeds} seeds each; {found['units']['train']} training, {found['units']['validation']} validation and "
        f"{found['units']['test']} test {unit}; {found['samples']} samples; ece over {found['bins']} bins of equal "
        f"width. {found['machine']['processor']}, {found['machine']['device']}; torch {found['machine']['torch']}; "
        f"{found['date']}."
    )
    return "\n\n".join([f"### {name}", about, _scores(found), _differences(found), _temperatures(found)])


def _scores(found: Results) -> str:
    names = list(next(iter(found["variants"].values())))
    rows = [
        [variant, *(f"{scores[name]['mean']:.4f}{_range(scores[name]['values'])}" for name in names)]
        for variant, scores in found["variants"].items()
    ]
    return _table(["mean over seeds (lowest to highest)", *names], rows)


def _range(values: Sequence[float]) -> str:
    return f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else ""


def _differences(found: Results) -> str:
    rows = []
    for each in found["differences"]:
        seeds = "-" if each["seeds"] is None else _interval(each["seeds"])
        verdict = _verdict(each)
        what = f"{each['second']} - {each['first']}"
        rows.append([what, each["score"], f"{each['difference']:+.4f}", _interval(each["examples"]), seeds, verdict])
    head = ["difference", "score", "", "95% over test examples", "95% over seeds", "told from chance by both"]
    return _table(head, rows)


def _verdict(each: Results) -> str:
    intervals = [each["examples"], each["seeds"] or [-1.0, 1.0]]
    if any(low <= 0 <= high for low, high in intervals):
        return "no"
    return "better" if (each["difference"] > 0) == each["higher_is_better"] else "WORSE"


def _temperatures(found: Results) -> str:
    rows = [
        [run["run"], ", ".join(f"{name} {_used(value)}" for name, value in run["temperatures"].items()) or "-"]
        for run in found["runs"]
    ]
    return _table(["run", "temperatures of samples, or their priors; factor of log-probabilities (scaled)"], rows)


def _used(value: float | None) -> str:
    return "infinite" if value is None else f"{value:.3g}"


def _interval(ends: Sequence[float]) -> str:
    return f"{ends[0]:+.4f} to {ends[1]:+.4f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def figure(name: str, found: Results, path: Path) -> None:
    """Draw every score with its seeds, and how often predictions of each confidence are right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(next(iter(found["variants"].values())))
    curves = {variant: found["reliability"].get(variant) for variant in CURVES}
    curves = {variant: curve for variant, curve in curves.items() if curve}
    panels = len(names) + bool(curves)
    height = 1.4 + 0.35 * len(found["variants"])
    drawing, axes = pyplot.subplots(
        1, panels, figsize=(3.6 * panels, max(height, 3.2)), layout="constrained", squeeze=False
    )
    for axis, score in zip(axes[0], names, strict=False):
        _dots(axis, found["variants"], score, first=axis is axes[0][0])
    if curves:
        _reliability(axes[0][-1], curves)
    drawing.suptitle(name, fontsize=10)
    drawing.savefig(path, dpi=130)
    pyplot.close(drawing)


def _dots(axis: Any, variants: Results, score: str, *, first: bool) -> None:
    for place, (variant, scores) in enumerate(reversed(variants.items())):
        colour = "C0" if variant.startswith("IVON") else "0.4"
        axis.plot(scores[score]["values"], [place] * len(scores[score]["values"]), "o", color=colour, alpha=0.5, ms=4)
        axis.plot(scores[score]["mean"], place, "|", color=colour, ms=14, mew=2)
    axis.set_yticks(range(len(variants)), list(reversed(variants)) if first else [], fontsize=8)
    axis.set_title(score, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.margins(x=0.15, y=0.1)
    axis.spines[["top", "right"]].set_visible(False)


def _reliability(axis: Any, curves: Results) -> None:
    axis.plot([0, 1], [0, 1], color="0.8", lw=1, zorder=0)
    for variant, curve in curves.items():
        style = {
            "color": "0.4" if variant.startswith("AdamW") else "C0",
            "ls": "--" if "samples" not in variant else "-",
        }
        axis.plot([row[1] for row in curve], [row[2] for row in curve], "o", ms=3, label=variant, lw=1.2, **style)
    axis.set_xlabel("confidence", fontsize=8)
    axis.set_title("share that is right", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=7, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results.json"
    print(tables(json.loads(given.read_text())))
