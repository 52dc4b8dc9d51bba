"""Experts and joint models of the study, by full fine-tuning and by LoRA; what exists is not trained again.

    python -m evaluation.merging.train OUT [--family language packages] [--seeds 0 1 2]

writes OUT/FAMILY/MODE/TASK/SEED/{final,half}.safetensors: the tensors that moved, dense, under the base's names, with
the heads of tasks as `TASK:classifier...`; a joint model is the task `joint`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from evaluation.merging.experts import FINAL, HALF, JOINT, Place
from evaluation.merging.family import Batch, Family, encoder_of, is_head
from evaluation.merging.language import Language, read_texts
from evaluation.merging.packages import Packages, read_rows

MODES = ("full", "lora")


@dataclass(frozen=True)
class Schedule:
    """How one expert is trained; the joint model takes as many steps as all experts together."""

    steps: int
    rate: float
    head_rate: float = 0.0
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0


SCHEDULES = {
    ("language", "full"): Schedule(steps=60, rate=3e-3),
    ("language", "lora"): Schedule(steps=40, rate=5e-3),
    ("packages", "full"): Schedule(steps=40, rate=2e-4, head_rate=5e-3),
    ("packages", "lora"): Schedule(steps=40, rate=2e-3, head_rate=5e-3),
}


def family_named(name: str) -> Family:
    """One of the two families of tasks, with the data of this machine."""
    return Language(read_texts()) if name == Language.name else Packages(read_rows())


def train(family: Family, mode: str, task: str, *, seed: int, schedule: Schedule, folder: Path) -> None:
    """Train one expert or joint model, and write it."""
    models = family.models(seed)
    shared = next(iter(models.values()))
    before = {name: value.detach().clone() for name, value in encoder_of(shared).items()}
    torch.manual_seed(seed)
    if mode == "lora":
        add_lora(models, family.lora_layers)
    tasks = family.tasks if task == JOINT else (task,)
    steps = schedule.steps * len(tasks)
    started, losses = time.perf_counter(), []
    feed = _feed(family, tasks, seed)
    optimizer, rates = _optimizer(models, tasks, schedule, steps)
    for step in range(steps):
        name, batch = next(feed)
        losses.append(_step(models[name].train(), batch, optimizer, schedule.clip))
        rates.step()
        if step + 1 == steps // 2 and task != JOINT:
            write(folder / f"{HALF}.safetensors", moved(models, tasks, before))
    write(folder / f"{FINAL}.safetensors", moved(models, tasks, before))
    seconds = time.perf_counter() - started
    tail = losses[-max(1, steps // 10) :]
    note = {"steps": steps, "seconds": round(seconds, 1), "first": losses[0], "last": sum(tail) / len(tail)}
    (folder / "run.json").write_text(json.dumps(note) + "\n")
    print(family.name, mode, task, seed, note, flush=True)


def add_lora(models: Mapping[str, nn.Module], layers: str, *, rank: int = 8) -> None:
    """Put adapters of this rank into the encoder that the models share, and freeze the rest but the heads."""
    from peft import LoraConfig, inject_adapter_in_model

    first = next(iter(models.values()))
    modules = {name for name, layer in first.named_modules() if isinstance(layer, nn.Linear) and not is_head(name)}
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers)
    inject_adapter_in_model(config, first)
    for model in dict.fromkeys(models.values()):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name or is_head(name))
    if not modules:
        raise SystemExit("the model has no linear layer for an adapter")


def _feed(family: Family, tasks: tuple[str, ...], seed: int) -> Iterator[tuple[str, Batch]]:
    streams = {task: family.training(task, seed) for task in tasks}
    while True:
        for task, stream in streams.items():
            yield task, next(stream)


def _optimizer(
    models: Mapping[str, nn.Module], tasks: tuple[str, ...], schedule: Schedule, steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    named = {id(value): (name, value) for task in tasks for name, value in models[task].named_parameters()}
    groups: list[dict[str, Any]] = [
        {"params": [value for name, value in named.values() if is_head(name)], "lr": schedule.head_rate},
        {"params": [value for name, value in named.values() if not is_head(name) and value.requires_grad]},
    ]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=schedule.rate,
        weight_decay=schedule.weight_decay,
        fused=True,
    )
    warmup = max(1, round(schedule.warmup * steps))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )


def _step(model: nn.Module, batch: Batch, optimizer: torch.optim.Optimizer, clip: float) -> float:
    loss: Tensor = model(**batch).loss
    optimizer.zero_grad()
    loss.backward()
    trained = [value for group in optimizer.param_groups for value in group["params"]]
    torch.nn.utils.clip_grad_norm_(trained, clip)
    optimizer.step()
    return loss.item()


@torch.no_grad()
def moved(models: Mapping[str, nn.Module], tasks: tuple[str, ...], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Dense tensors that differ from the base, adapters added to their layers; and the heads of the tasks."""
    model = models[tasks[0]]
    found = {name: value for name, value in encoder_of(model).items() if name in before and value.requires_grad}
    for name, layer in model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            found[f"{name}.weight"] = layer.base_layer.weight + layer.get_delta_weight("default")
    for task in tasks:
        heads = {name: value for name, value in models[task].named_parameters() if is_head(name)}
        found |= {f"{task}:{name}": value for name, value in heads.items()}
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path)


def main() -> None:
    """Train everything that is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--family", nargs="+", default=["language", "packages"])
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    for name in options.family:
        family = family_named(name)
        for seed in options.seeds:
            for mode in options.modes:
                for task in (*family.tasks, JOINT):
                    folder = Place(options.out, name, mode, seed).folder(task)
                    if not (folder / "run.json").exists():
                        schedule = SCHEDULES[name, mode]
                        train(family, mode, task, seed=seed, schedule=schedule, folder=folder)


if __name__ == "__main__":
    main()
