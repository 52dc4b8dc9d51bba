"""A plan for people: inputs, precisions, every step, what it takes, and what the disk has."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from mergekit_bayes.checkpoint.disk import format_bytes, free_bytes
from mergekit_bayes.merge.inputs import Input
from mergekit_bayes.merge.memory import peak_memory
from mergekit_bayes.merge.plan import MergePlan
from mergekit_bayes.merge.steps import CopyStep, ModuleStep, Operand, Step, TensorStep, weights_by_label


def plan_text(plan: MergePlan, *, steps: bool = True) -> str:
    """The plan as text, one line per fact.

    Args:
        plan: the plan.
        steps: list every tensor.

    Returns:
        Several lines without a trailing newline.
    """
    sections = [_head(plan), _inputs(plan), _notes(plan)]
    if steps:
        sections.append(_steps(plan))
    sections += [_files(plan), _resources(plan)]
    return "\n\n".join("\n".join(lines) for lines in sections if lines)


def _head(plan: MergePlan) -> list[str]:
    prior = (
        "unused"
        if plan.method.prior == "unused"
        else ("sidecar of the base" if plan.prior is None else f"{plan.prior:g}")
    )
    output = "full checkpoint" if plan.space == "full" else f"LoRA adapter ({plan.space} space)"
    return [
        f"method     {plan.method.name}: {plan.method.summary}",
        f"output     {output}, arithmetic in {'float64' if plan.compute_dtype == 'F64' else 'float32'}",
        f"prior      {prior}",
        f"scale      {plan.recipe.scale}",
    ]


def _inputs(plan: MergePlan) -> list[str]:
    lines = []
    if plan.base is not None:
        lines.append(f"base       {plan.base.label}{_precision(plan.base)}")
    tasks = {label: f"  (task {task})" for task, labels in plan.tasks for label in labels}
    return lines + [f"source     {s.label}{tasks.get(s.label, '')}{_precision(s)}" for s in plan.sources]


def _precision(source: Input) -> str:
    if source.scalar_precision is not None:
        return f"  (precision {source.scalar_precision:g} everywhere)"
    if source.sidecar is None:
        return "  (no precision)"
    metadata = source.sidecar.metadata
    family = [] if metadata.family == "diagonal" else [metadata.family]
    parts = [metadata.estimator, *family, f"{metadata.space} space"]
    if metadata.num_examples:
        parts.append(f"{metadata.num_examples:,} {metadata.loss_unit or 'unit'}s")
    return f"  (precision: {', '.join(parts)})"


def _notes(plan: MergePlan) -> list[str]:
    return [f"note       {note}" for note in plan.notes]


def _steps(plan: MergePlan) -> list[str]:
    rows = [_row(step, [source.label for source in plan.sources]) for step in plan.steps]
    rows += [_dropped_row(plan, name, reason) for name, reason in plan.dropped.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)).rstrip() for row in rows
    ]


def _row(step: Step, labels: Sequence[str]) -> tuple[str, str, str, str, str]:
    if isinstance(step, CopyStep):
        return "copy", step.name, _shape(step.shape), step.dtype, step.reason
    known = weights_by_label(step)
    weights = ", ".join(f"{known[label]:g}" if label in known else "-" for label in labels)
    options = "".join(f"; {name.rstrip('_')} {_value(value)}" for name, value in step.options)
    if isinstance(step, ModuleStep):
        shape = f"{step.out_features} x {step.in_features}, rank {step.rank}"
        return step.mode, step.name, shape, step.dtype, f"weights {weights}{options}"
    # A source without a precision of its own has been given the prior's.
    found = sum(_known_beyond(source, step.base) for source in step.sources)
    precisions = f"; precisions {found} of {len(step.sources)}" if step.precision_dtype is not None else ""
    kind = "whole" if isinstance(step, TensorStep) else "merge"
    return kind, step.name, _shape(step.shape), step.dtype, f"weights {weights}{precisions}{options}"


def _known_beyond(source: Operand, prior: Operand) -> bool:
    return source.curvature is not None or (source.has_precision and source.precision != prior.precision)


def _value(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(_value, value))
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _dropped_row(plan: MergePlan, name: str, reason: str) -> tuple[str, str, str, str, str]:
    assert plan.base is not None  # only of a base is anything dropped
    assert plan.base.checkpoint is not None
    tensor = plan.base.checkpoint.tensors[name]
    return "drop", name, _shape(tensor.shape), tensor.dtype, reason


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _files(plan: MergePlan) -> list[str]:
    def lines() -> Iterator[str]:
        beside = [plan.initial.layout] if plan.initial is not None else []
        pairs = [(unit.layout, unit.precision_layout) for unit in plan.units]
        for layout in (*(layout for pair in pairs for layout in pair), *beside):
            if layout is not None:
                count = f"{len(layout.entries)} tensor{'' if len(layout.entries) == 1 else 's'}"
                yield f"file       {layout.filename}: {count}, {format_bytes(layout.nbytes)}"

    return list(lines())


def _resources(plan: MergePlan) -> list[str]:
    kinds = Counter("copied" if isinstance(step, CopyStep) else "merged" for step in plan.steps)
    dropped = f", {len(plan.dropped)} dropped" if plan.dropped else ""
    lines = [
        f"tensors    {kinds['merged']} merged, {kinds['copied']} copied{dropped}",
        f"read       {format_bytes(plan.bytes_read)}",
        f"write      {format_bytes(plan.bytes_written)}",
        f"memory     about {format_bytes(peak_memory(plan))} at its peak",
    ]
    if plan.out is not None:
        lines.append(f"disk       {format_bytes(free_bytes(plan.out))} free at {plan.out}")
    return lines
