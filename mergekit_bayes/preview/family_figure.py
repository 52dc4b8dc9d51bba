"""What merges of every family are predicted to cost, as a picture: by source, and layer by layer."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from mergekit_bayes.checkpoint.disk import write_atomically
from mergekit_bayes.merge.diagnosis import place_of, short_labels
from mergekit_bayes.preview.families import AS_MERGED, FamilyCosts

__all__ = ["draw_families", "layers_of"]

_COLOURS = {"isotropic": "C7", "diagonal": "C0", "kronecker": "C3", AS_MERGED: "k"}
_OUTSIDE = "outside"
_LONGEST_NAME = 24


def draw_families(path: Path, costs: FamilyCosts) -> None:
    """Draws the predicted loss increase of every source under every family, and of all sources layer by layer.

    Args:
        path: a PNG file; the same costs give the same picture.
        costs: of `compare_families`.

    Raises:
        OutputError: the disk failed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    layers = layers_of(costs)
    # no pyplot: it keeps figures and looks for a display
    figure = Figure(
        figsize=(3.2 + 1.1 * len(costs.labels) + 0.16 * len(layers) + 2.4, 3.6), dpi=120, layout="constrained"
    )
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _by_source(left, costs)
    _by_layer(right, costs, layers)
    unit = "nats per training unit" if costs.per_unit else "nats"
    left.set_ylabel(f"predicted loss increase, {unit}", fontsize=8)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomically(path, buffer.getvalue())


def layers_of(costs: FamilyCosts) -> dict[str, dict[str, float]]:
    """Predicted loss increase of all sources together by layer, in order and what is outside them last, and by row."""
    found: dict[int | None, dict[str, float]] = {}
    for row, sources in costs.by_tensor.items():
        for tensors in sources.values():
            for name, value in tensors.items():
                own = found.setdefault(place_of(name)[0], {})
                own[row] = own.get(row, 0.0) + value
    order = sorted(found, key=lambda layer: (layer is None, layer or 0))
    return {_OUTSIDE if layer is None else str(layer): found[layer] for layer in order}


def _by_source(axes: Any, costs: FamilyCosts) -> None:
    rows, width = list(costs.by_tensor), 0.8 / len(costs.by_tensor)
    for place, row in enumerate(rows):
        at = [index + width * (place - (len(rows) - 1) / 2) for index in range(len(costs.labels))]
        axes.bar(at, [costs.cost(row, label) for label in costs.labels], width, color=_COLOURS[row], label=row)
    names = short_labels(costs.labels)
    axes.set_xticks(range(len(costs.labels)), [names[label][-_LONGEST_NAME:] for label in costs.labels], fontsize=8)
    _plain(axes)


def _by_layer(axes: Any, costs: FamilyCosts, layers: dict[str, dict[str, float]]) -> None:
    for row in costs.by_tensor:
        style = "--" if row == AS_MERGED else "-"
        values = [own.get(row, 0.0) for own in layers.values()]
        axes.plot(range(len(layers)), values, f"o{style}", ms=3, lw=1.2, color=_COLOURS[row])
    step = -(-len(layers) // 16)
    axes.set_xticks(range(0, len(layers), step), list(layers)[::step], fontsize=8)
    axes.set_xlabel("layer, all sources together", fontsize=8)
    _plain(axes)


def _plain(axes: Any) -> None:
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
