"""The model card of a merge: what it was made of, by which rule, and what that is predicted to cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_bayes.checkpoint.files import listed
from mergekit_bayes.merge.plan import MergePlan
from mergekit_bayes.recipe import dump_yaml


def model_card(plan: MergePlan, report: Mapping[str, Any]) -> str:
    """Markdown with the metadata block that model hubs read.

    Args:
        plan: the plan that was carried out.
        report: the content of the report.

    Returns:
        The text of README.md.
    """
    recipe = {key: value for key, value in plan.recipe.resolved().items() if key != "output"}
    parts = [
        "---\n" + dump_yaml(_metadata(plan)) + "---",
        "# Merged model",
        f"Made with `mergekit_bayes`, method `{plan.method.name}` ({plan.method.paper}), space `{plan.space}`.",
        plan.method.summary,
        _sources(plan, report),
        _adapter(plan, report),
        _head(plan),
        _precision(plan),
        "## Recipe\n\n```yaml\n" + dump_yaml(recipe) + "```",
        "`merge_report.json` holds fingerprints of every input, versions, and what was measured layer by layer.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(plan: MergePlan) -> dict[str, object]:
    models = [source.label.split("@")[0] for source in plan.inputs]
    hub = list(dict.fromkeys(name for name in models if name.count("/") == 1 and not Path(name).exists()))
    return {
        **({"base_model": hub} if hub else {}),
        "library_name": "transformers" if plan.space == "full" else "peft",
        **({"pipeline_tag": "text-classification"} if _classifies_text(plan) else {}),
        "tags": ["merge", "mergekit_bayes"],
    }


def _sources(plan: MergePlan, report: Mapping[str, Any]) -> str:
    lines = ["| source | weight | predicted loss increase |", "|---|---|---|"]
    weights = report["method"]["weights"]
    for source in plan.sources:
        weight = weights.get(source.label)
        shown = f"{weight:g}" if isinstance(weight, int | float) else "by tensor"
        gap = report["mismatch"].get(source.label)
        cost = "-" if gap is None else f"{gap['total']:.4g}"
        if gap is not None and gap["per_unit"] is not None:
            cost += f" ({gap['per_unit']:.3g} per training unit)"
        lines.append(f"| {source.label} | {shown} | {cost} |")
    return "\n".join(lines)


def _adapter(plan: MergePlan, report: Mapping[str, Any]) -> str:
    if plan.space == "full":
        return ""
    lost = report["largest"].get("lost_energy")
    cut = f" At most {lost['value']:.3g} of a layer's squared norm was lost to the rank." if lost is not None else ""
    return (
        f"A LoRA adapter of rank {plan.configuration['r']} with scaling 1, to be loaded on its base with "
        f"`PeftModel.from_pretrained`.{cut}"
    )


def _classifies_text(plan: MergePlan) -> bool:
    return plan.task.labels is not None and "SequenceClassification" in (plan.task.architecture or "")


def _head(plan: MergePlan) -> str:
    if plan.task.labels is None:
        return ""
    shown = f"Its head tells {listed(plan.task.labels)}, in this order."
    if plan.space == "full" or not _classifies_text(plan):
        return shown
    auto = f"AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels={len(plan.task.labels)})"
    return f"{shown} `{auto}` loads base and head."


def _precision(plan: MergePlan) -> str:
    if plan.sidecar is None:
        return ""
    return (
        "`precision.safetensors` holds the precision of every merged weight: the result is a posterior again and can "
        "be merged further."
    )
