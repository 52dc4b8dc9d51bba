"""The model card of a fine-tuned model: what was trained on what, how it went, and what its precision is worth."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_bayes.recipe import dump_yaml

__all__ = ["model_card"]

_PIPELINES = {"causal_lm": "text-generation", "sequence_classification": "text-classification"}


def model_card(report: Mapping[str, Any]) -> str:
    """Returns the text of README.md: Markdown with the metadata block that model hubs read.

    Args:
        report: content of the run's report.
    """
    parts = [
        "---\n" + dump_yaml(_metadata(report)) + "---",
        f"# Fine-tuned {report['base']['path']}",
        _opening(report),
        _scores(report["evaluation"]),
        "![Loss during training](loss.png)",
        _data(report),
        _precision(report),
        "\n".join(["## Notes", "", *(f"- {note}" for note in report["notes"])]) if report["notes"] else "",
        "## Recipe\n\n```yaml\n" + dump_yaml(report["recipe"]) + "```",
        "`finetune_report.json` holds versions, fingerprints, timings and diagnostics; `log.jsonl` the whole course.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(report: Mapping[str, Any]) -> dict[str, object]:
    base = report["base"]["path"]
    on_hub = base.count("/") == 1 and not Path(base).exists()
    adapter = report["trained"]["adapter"]
    return {
        **({"base_model": base} if on_hub else {}),
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": _PIPELINES[report["task"]],
        "tags": ["mergekit_bayes", report["optimizer"]["name"], *(["lora"] if adapter else [])],
    }


def _opening(report: Mapping[str, Any]) -> str:
    trained, length = report["trained"], report["length"]
    what = f"A LoRA adapter ({trained['parameters']:,} trained parameters)" if trained["adapter"] else "All weights"
    how = "" if trained["adapter"] else f" ({trained['parameters']:,})"
    name = {"ivon": "IVON, which leaves a posterior behind", "adamw": "AdamW"}[report["optimizer"]["name"]]
    course = f"{length['steps']:,} steps of {length['global_batch']} rows, {length['epochs']:.3g} epochs"
    seen = f"{report['units']['seen']:,} {_units(report)}"
    return f"{what}{how}, trained with `mergekit_bayes` and {name}: {course}, {seen}."


def _units(report: Mapping[str, Any]) -> str:
    return {"token": "predicted tokens", "example": "examples"}[report["units"]["unit"]]


def _scores(evaluation: Mapping[str, Mapping[str, float]]) -> str:
    if not evaluation:
        return ""
    names = list(next(iter(evaluation.values())))
    lines = [
        "## Held-out data",
        "",
        "Scores of the mean weights at the end of the run.",
        "",
        f"| data set | {' | '.join(names)} |",
        f"|---|{'---:|' * len(names)}",
    ]
    for data_set, scores in evaluation.items():
        lines.append(f"| {data_set} | {' | '.join(f'{scores[name]:,.4g}' for name in names)} |")
    return "\n".join(lines)


def _data(report: Mapping[str, Any]) -> str:
    units = report["units"]
    return f"## Training data\n\n{units['rows']:,} rows with {units['in_data']:,} {_units(report)}."


def _precision(report: Mapping[str, Any]) -> str:
    found = report["precision"]
    if not found:
        return ""
    warning = f"\n\n**{found['warning']}**" if found["warning"] else ""
    return (
        "## Precision\n\n"
        f"`precision.safetensors` holds the inverse variance of every trained weight at the scale of the data "
        f"(N = {found['num_examples']:,}), so that `bayes-merge` takes this folder as a posterior. "
        f"{found['moved']:.1%} of the curvatures are more than 10% away from where they started.{warning}"
    )
