"""Where the sources of a merge conflict, as a picture: a panel for each source, its layers down, tensors across."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from mergekit_bayes.checkpoint.disk import write_atomically
from mergekit_bayes.merge.diagnosis import Diagnosis, SourceCost, place_of, short_labels

__all__ = ["draw_heat_map"]

_OUTSIDE = "outside"
_FEWEST_ROWS, _MOST_ROWS_NAMED = 10, 40
_LONGEST_TITLE = 32


def draw_heat_map(path: Path, diagnosis: Diagnosis) -> None:
    """Draws the predicted loss increase by source, layer and tensor, on one scale of colours for all sources.

    Args:
        path: a PNG file; the same report gives the same picture.
        diagnosis: of the merge.

    Raises:
        OutputError: the disk failed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = _axes(diagnosis)
    count = len(diagnosis.costs)
    size = (
        1.6 + count * max(2.2, 0.34 * len(columns)),
        1.9 + 0.24 * min(max(len(rows), _FEWEST_ROWS), _MOST_ROWS_NAMED),
    )
    # no pyplot: it keeps figures and looks for a display
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grids = [_grid(cost, rows, columns, per_unit=diagnosis.per_unit) for cost in diagnosis.costs]
    highest = max((value for grid in grids for line in grid for value in line), default=0.0) or 1.0
    titles = short_labels([cost.label for cost in diagnosis.costs])
    panels = figure.subplots(1, count, squeeze=False, sharey=True)[0]
    for axes, cost, grid in zip(panels, diagnosis.costs, grids, strict=True):
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0.0, vmax=highest, interpolation="nearest")
        axes.set_title(titles[cost.label][-_LONGEST_TITLE:], fontsize=8)
        axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=7)
    names = [_OUTSIDE if row is None else str(row) for row in rows]
    step = -(-len(rows) // _MOST_ROWS_NAMED)
    panels[0].set_yticks(range(0, len(rows), step), names[::step], fontsize=7)
    panels[0].set_ylabel("layer")
    unit = "nats per training unit" if diagnosis.per_unit else "nats"
    figure.colorbar(image, ax=list(panels), label=f"predicted loss increase, {unit}")
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_atomically(path, buffer.getvalue())


def _axes(diagnosis: Diagnosis) -> tuple[list[int | None], list[str]]:
    """Layers in order, tensors outside them last; names of tensors, those of layers first."""
    places = {place_of(name) for cost in diagnosis.costs for name in cost.by_tensor}
    numbers = sorted({layer for layer, _ in places if layer is not None})
    inside = sorted({name for layer, name in places if layer is not None})
    outside = sorted({name for layer, name in places if layer is None} - set(inside))
    rows: list[int | None] = [*numbers]
    if any(layer is None for layer, _ in places):
        rows.append(None)
    return rows, inside + outside


def _grid(cost: SourceCost, rows: Sequence[int | None], columns: Sequence[str], *, per_unit: bool) -> list[list[float]]:
    """Numbers by layer and tensor; a place without a tensor stays empty."""
    grid = [[float("nan")] * len(columns) for _ in rows]
    for name, value in cost.by_tensor.items():
        layer, kind = place_of(name)
        row, column = rows.index(layer), columns.index(kind)
        before = grid[row][column]
        added = value * (cost.scale if per_unit else 1.0)
        grid[row][column] = added if before != before else before + added  # noqa: PLR0124  (NaN is not itself)
    return grid
