"""Recipes over tiny models and tables in memory, run in this process."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mergekit_bayes.finetune.run import FinetuneResult, finetune

WORDS = 40


def texts(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Sentences in which every word follows from the one before: w3 w6 w9 ..."""
    return [
        {"text": " ".join(f"w{(3 * (seed + row) + 3 * place) % WORDS}" for place in range(4 + row % 5))}
        for row in range(count)
    ]


def labelled(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Texts whose first word says their label."""
    names = ("animal", "plant", "stone")
    return [
        {"text": f"w{row % 3} w{(row + seed) % WORDS} w{(5 * row) % WORDS}", "label": names[row % 3]}
        for row in range(count)
    ]


TABLES: Mapping[str, list[dict[str, Any]]] = {
    "texts": texts(24),
    "other texts": texts(9, seed=24),
    "labelled": labelled(24),
    "other labelled": labelled(9, seed=5),
}


def recipe(base: Path, *, task: str = "causal_lm", **sections: Any) -> dict[str, Any]:
    """A short IVON-LoRA run; each section given is merged into it, None removes it."""
    name = "texts" if task == "causal_lm" else "labelled"
    content: dict[str, Any] = {
        "kind": "finetune",
        "model": {"path": str(base), "task": task},
        "adapter": {"r": 4, "lora_alpha": 8},
        "data": {"train": name, "eval": f"other {name}"},
        "optimizer": {
            "name": "ivon",
            "lr": 10.0,
            "rescale_lr": True,
            "temperature": 1.0,
            "noise_to_weight": 0.02,
            "clip_radius": 1e6,
        },
        "training": {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 2},
    }
    for key, section in sections.items():
        if section is None:
            del content[key]
        elif isinstance(section, Mapping) and isinstance(content.get(key), Mapping):
            content[key] = {name: value for name, value in {**content[key], **section}.items() if value is not None}
        else:
            content[key] = section
    return content


def run(content: Mapping[str, Any], out: Path, **options: Any) -> FinetuneResult:
    return finetune(content, out, tables=TABLES, **options)


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an output: weights, precisions, and the state of every checkpoint."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            found[f"{path.relative_to(folder)}: {name}"] = tensor
    return found


def same_tensors(left: Path, right: Path) -> bool:
    one, other = tensors_of(left), tensors_of(right)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
