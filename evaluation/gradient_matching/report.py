"""Tables and the figure of the results; averages, nothing else, are computed here."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

Results = Mapping[str, Any]

ACCURACY, NLL = 0, 1
STYLES = {
    "task arithmetic": ("C1", "-"),
    "Fisher averaging": ("C2", ":"),
    "gradient matching, squared gradients": ("C0", "-"),
    "gradient matching, IVON": ("C3", "-"),
    "task arithmetic, IVON's models": ("C1", "--"),
    "gradient matching, squared gradients, IVON's models": ("C0", "--"),
}


def tables(results: Results) -> str:
    """Accuracy and loss over the scale, domains at scale 1, models by themselves, what precisions cost and say."""
    parts = [_over_scales(results, ACCURACY), _over_scales(results, NLL), _domains(results), _by_seed(results)]
    return "\n\n".join([*parts, _costs(results), _curvature(results)])


def curves(run: Results) -> dict[str, Any]:
    """Scores of all merges of one seed, by name, scale and domain."""
    return {name: found for optimizer in run.values() for name, found in optimizer["curves"].items()}


def average(run: Results, name: str, scale: str, metric: int) -> float:
    """One seed's score of a merge, averaged over all domains with the same weight."""
    return fmean(scores[metric] for scores in curves(run)[name][scale].values())


def over_seeds(results: Results, name: str, scale: str, metric: int) -> float:
    """The same, averaged over seeds."""
    return fmean(average(run, name, scale, metric) for run in results["runs"])


def _scales(results: Results) -> list[str]:
    return list(curves(results["runs"][0])["task arithmetic"])


def _names(results: Results) -> list[str]:
    return list(curves(results["runs"][0]))


def _over_scales(results: Results, metric: int) -> str:
    scales = _scales(results)
    rows = []
    for name in _names(results):
        has = curves(results["runs"][0])[name]
        found = {scale: over_seeds(results, name, scale, metric) for scale in scales if scale in has}
        best = max(found, key=lambda scale: found[scale] * (-1 if metric == NLL else 1))
        cells = [f"{found[scale]:.3f}" if scale in found else "" for scale in scales]
        rows.append([name, *cells, f"{best}: {found[best]:.3f}" if len(found) > 1 else ""])
    return _table([("accuracy", "nll")[metric], *scales, "best"], rows)


def _domains(results: Results) -> str:
    domains = list(results["rows"]["test"])
    rows = [
        _domain_row("base, AdamW", results, "task arithmetic", "0"),
        _domain_row("base, IVON", results, "task arithmetic, IVON's models", "0"),
    ]
    rows += [_domain_row(name, results, name, "1") for name in _names(results)]
    for optimizer, word in (("adamw", "AdamW"), ("ivon", "IVON")):
        found = [fmean(run[optimizer]["at_home"][domain][ACCURACY] for run in results["runs"]) for domain in domains]
        rows.append([f"each expert at home, {word}", *(f"{value:.3f}" for value in found), f"{fmean(found):.3f}"])
    return _table(["accuracy at scale 1", *domains, "average"], rows)


def _domain_row(label: str, results: Results, name: str, scale: str) -> list[str]:
    domains = list(results["rows"]["test"])
    found = [fmean(curves(run)[name][scale][domain][ACCURACY] for run in results["runs"]) for domain in domains]
    return [label, *(f"{value:.3f}" for value in found), f"{fmean(found):.3f}"]


def _by_seed(results: Results) -> str:
    rows = []
    for name in _names(results):
        at_one = [average(run, name, "1", ACCURACY) for run in results["runs"]]
        gains = [value - _base(run, name) for value, run in zip(at_one, results["runs"], strict=True)]
        spread = f"{stdev(gains):.3f}" if len(gains) > 1 else "-"
        rows.append([name, *(f"{value:.3f}" for value in at_one), f"{fmean(gains):+.3f}", spread])
    seeds = [f"seed {seed}" for seed in results["seeds"]]
    return _table(["average accuracy at scale 1", *seeds, "gain on its base", "its deviation over seeds"], rows)


def _base(run: Results, name: str) -> float:
    return average(run, "task arithmetic, IVON's models" if "IVON" in name else "task arithmetic", "0", ACCURACY)


def _costs(results: Results) -> str:
    def seconds(optimizer: str, what: str) -> float:
        return fmean(run[optimizer]["seconds"][what] for run in results["runs"])

    plain = seconds("adamw", "training")
    rows = [
        [label, f"{value:.1f}", f"{100 * value / plain - 100 * whole:+.0f}%"]
        for label, value, whole in (
            ("AdamW, no precisions", plain, 1),
            ("squared gradients, after AdamW", seconds("adamw", "passes"), 0),
            ("IVON, precisions included", seconds("ivon", "training"), 1),
        )
    ]
    return _table(["base and experts", "seconds of one core", "over AdamW's training"], rows)


def _curvature(results: Results) -> str:
    head = {
        "ivon": "IVON, mean of N h",
        "squared_gradients": "squared gradients, mean of N F",
        "rank_correlation": "rank correlation",
    }
    rows = []
    for name in results["runs"][0]["ivon"]["agreement"]:
        found = [run["ivon"]["agreement"][name] for run in results["runs"]]
        cells = [", ".join(f"{each[key]:.2g}" for each in found) for key in head]
        rows.append([name, *cells])
    return _table(["curvature of IVON's models, by seed", *head.values()], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def figure(results: Results, path: Path) -> None:
    """Draw accuracy and loss against the scale, averaged over domains, with the range over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawing, axes = pyplot.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained")
    for axis, metric, label in zip(axes, (ACCURACY, NLL), ("accuracy", "negative log-likelihood, nats"), strict=True):
        for name in _names(results):
            _line(axis, results, name, metric)
        axis.set_xlabel("scaling factor alpha", fontsize=9)
        axis.set_yscale("log" if metric == NLL else "linear")
        axis.set_title(f"{label}, average of all domains", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    drawing.legend(handles, labels, fontsize=8, ncols=2, loc="outside lower center", frameon=False)
    drawing.savefig(path, dpi=90)
    pyplot.close(drawing)


def _line(axis: Any, results: Results, name: str, metric: int) -> None:
    colour, style = STYLES[name]
    scales = list(curves(results["runs"][0])[name])
    if name == "Fisher averaging":
        axis.axhline(over_seeds(results, name, "1", metric), color=colour, ls=style, label=name)
        return
    values = [[average(run, name, scale, metric) for run in results["runs"]] for scale in scales]
    at = [float(scale) for scale in scales]
    axis.plot(at, [fmean(each) for each in values], "o", color=colour, ls=style, ms=4, label=name)
    axis.fill_between(at, [min(each) for each in values], [max(each) for each in values], color=colour, alpha=0.1)


if __name__ == "__main__":
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results.json"
    print(tables(json.loads(given.read_text())))
