"""What an output says about itself: sidecar metadata, header strings, and the report.

None of it holds a time, a host name or an absolute path that the recipe did not write: the same merge gives the same
bytes on every machine.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from mergekit_bayes.checkpoint.sidecar import SidecarMetadata
from mergekit_bayes.merge.adapters import reference_scaling
from mergekit_bayes.merge.attach import recorded_bases
from mergekit_bayes.merge.inputs import Input
from mergekit_bayes.merge.setting import Setting
from mergekit_bayes.merge.steps import CopyStep, Step, terms_of, weights_by_label

if TYPE_CHECKING:
    from mergekit_bayes.merge.plan import MergePlan

UNKNOWN_FINGERPRINT = "blake2b-16:" + "0" * 32
"""Stands in a sidecar's header until the weights beside it are written; replaced byte for byte."""

REPORT_NAME = "merge_report.json"


def merged_metadata(setting: Setting, steps: Sequence[Step]) -> SidecarMetadata:
    """Metadata of the merged sidecar: data scale (`sum`), with the prior of the merge."""
    known = [source.sidecar.metadata for source in setting.sources if source.sidecar is not None]
    units = {metadata.loss_unit for metadata in known}
    scale = data_scale(setting.recipe.scale, _units(setting))
    prior = setting.scalar_prior if setting.needs_prior else None
    space = setting.sidecar_space
    return SidecarMetadata(
        family="kronecker" if any(terms_of(step) for step in steps) else "diagonal",
        estimator="merged",
        loss_unit=units.pop() if len(units) == 1 else None,
        num_examples=_units(setting),
        # In product space S_0 belongs to dW; what it means for fitted factors is not a number.
        prior_precision=prior * scale if prior is not None and setting.space in ("factor", space) else None,
        prior_mean="base" if setting.space == "full" else "zero",
        space=space,
        adapter_scaling=_prior_scaling(setting),
        base_model=setting.recipe.base_model,
        base_fingerprint=_base_fingerprint(setting),
        mean_fingerprint=UNKNOWN_FINGERPRINT,
    )


def _prior_scaling(setting: Setting) -> float | None:
    """The scaling of factors that the prior refers to; the written one is 1 in any case."""
    if setting.space == "full":
        return None
    return reference_scaling(setting) if setting.space == "factor" else 1.0


def data_scale(scale: str, units: int | None) -> float:
    """Factor that brings merged precisions back to data scale: 1, or the merged number of units for `scale: mean`."""
    return 1.0 if scale == "sum" else float(units or 1)


def _units(setting: Setting) -> int | None:
    """Training units behind the merged posterior: those of all sources together."""
    counts = [source.sidecar.metadata.num_examples for source in setting.sources if source.sidecar is not None]
    known = [count for count in counts if count]
    return sum(known) if known and len(known) == len(counts) else None


def _base_fingerprint(setting: Setting) -> str | None:
    if setting.base is not None and setting.base.checkpoint is not None:
        return setting.base.fingerprint if setting.base.adapter is None else None
    known = {seen for source in setting.sources for seen in recorded_bases(source)}
    return known.pop() if len(known) == 1 else None


def metadata_strings(setting: Setting, *, space: str, initial: bool = False) -> dict[str, str]:
    """Strings for the header of the output's weights; `format: pt` is what transformers insists on.

    Args:
        setting: the recipe and its inputs.
        space: of the output; a full model has a configuration to tell the rest.
        initial: for the file of starting values beside it, which has none.
    """
    strings = {"format": "pt"}
    if space != "full" or initial:
        known = setting.task.provenance.facts()
        content = {"base_fingerprint": _base_fingerprint(setting), "method": setting.method.name, **known}
        strings["mergekit_bayes"] = json.dumps(content, sort_keys=True)
    return strings


def report(
    plan: MergePlan,
    records: Mapping[str, Mapping[str, object]],
    options: Mapping[str, object],
    divisors: Mapping[str, float],
) -> str:
    """The report as JSON text.

    Args:
        plan: the plan that was carried out.
        records: what was measured, by step name.
        options: the options that can change bytes.
        divisors: what the curvatures of sources were divided by, by their labels.

    Returns:
        JSON with sorted keys.
    """
    copies = [step for step in plan.steps if isinstance(step, CopyStep)]
    content = {
        "format": "mergekit_bayes.merge_report",
        "version": 1,
        "method": {
            "name": plan.method.name,
            "paper": plan.method.paper,
            "space": plan.space,
            "scale": plan.recipe.scale,
            "prior_precision": plan.prior,
            "floor": plan.recipe.precision.floor,
            "source_floor": plan.recipe.precision.source_floor,
            "curvature_divided_by": dict(divisors),
            "weights": _weights(plan),
        },
        "inputs": [_input(source, role) for source, role in _roles(plan)],
        "tensors": {
            "merged": len(plan.steps) - len(copies),
            "copied": {step.name: step.reason for step in copies},
            "dropped": dict(plan.dropped),
            "started": sorted(plan.initial.tensors) if plan.initial is not None else [],
            "notes": list(plan.notes),
        },
        "mismatch": _mismatch(plan, records),
        "layers": _measurements(records),
        "largest": _largest(records),
        "responsibilities": _responsibilities(records),
        "seed": plan.recipe.seed,
        "options": dict(options),
        "versions": _versions(),
    }
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _roles(plan: MergePlan) -> list[tuple[Input, str]]:
    base = [(plan.base, "base")] if plan.base is not None else []
    return [*base, *((source, "source") for source in plan.sources)]


def _input(source: Input, role: str) -> dict[str, object]:
    sidecar = source.sidecar
    return {
        "role": role,
        "reference": source.label,
        "revision": source.revision,
        "fingerprint": source.fingerprint,
        "precision": source.scalar_precision if sidecar is None else json.loads(sidecar.metadata.to_json()),
    }


def _weights(plan: MergePlan) -> dict[str, object]:
    """Effective weights by source where they are the same for every tensor, else by tensor and source."""
    found = {step.name: weights_by_label(step) for step in plan.steps if not isinstance(step, CopyStep)}
    shared = {label: weight for weights in found.values() for label, weight in weights.items()}
    if all(weights.items() <= shared.items() for weights in found.values()):
        return dict(shared)
    return dict(found)


def _mismatch(plan: MergePlan, records: Mapping[str, Mapping[str, object]]) -> dict[str, object]:
    """Predicted loss increase per source, summed over its training units and per unit, in total and by layer."""
    by_source: dict[str, dict[str, float]] = {}
    for name in sorted(records):
        gaps = records[name].get("mismatch")
        for label, value in gaps.items() if isinstance(gaps, Mapping) else ():
            by_source.setdefault(label, {})[name] = float(value)
    result: dict[str, object] = {}
    for source in plan.sources:
        measured = by_source.get(source.label)
        if measured:
            units = source.sidecar.metadata.num_examples if source.sidecar is not None else None
            # With `scale: mean` precisions, and what is measured by them, are per unit.
            factor = 1.0 if plan.recipe.scale == "sum" else float(units or 1)
            layers = {name: value * factor for name, value in measured.items()}
            total = sum(layers.values())
            per_unit = total / units if units else None
            result[source.label] = {"total": total, "per_unit": per_unit, "by_layer": layers}
    return result


def _measurements(records: Mapping[str, Mapping[str, object]]) -> dict[str, dict[str, object]]:
    """What was measured by layer, without the mismatch."""
    kept = {name: {key: value for key, value in records[name].items() if key != "mismatch"} for name in sorted(records)}
    return {name: record for name, record in kept.items() if record}


def _largest(records: Mapping[str, Mapping[str, object]]) -> dict[str, dict[str, object]]:
    """The layer where an approximation is worst, for each of its measures."""
    found: dict[str, dict[str, object]] = {}
    for key in ("cross_terms", "iterations", "lost_energy", "residual", "truncation_loss", "variance_misfit"):
        values = {name: value for name in sorted(records) if isinstance(value := records[name].get(key), float)}
        if values:
            worst = max(values, key=lambda name: values[name])
            found[key] = {"layer": worst, "value": values[worst]}
    return found


def _responsibilities(records: Mapping[str, Mapping[str, object]]) -> dict[str, float]:
    """The share of every component of a mixture in its task, on average over the tensors that have it."""
    found: dict[str, list[float]] = {}
    for name in sorted(records):
        shares = records[name].get("responsibilities")
        for label, share in shares.items() if isinstance(shares, Mapping) else ():
            found.setdefault(label, []).append(float(share))
    return {label: sum(shares) / len(shares) for label, shares in found.items()}


def _versions(names: Sequence[str] = ("mergekit-bayes", "torch", "safetensors")) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
