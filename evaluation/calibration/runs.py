"""Finished fine-tuning runs: what they say about themselves, their models, and held-out rows as they read them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_bayes.checkpoint.sidecar import find_sidecar, open_sidecar
from mergekit_bayes.data import collate, evaluation_batches, load_training_data
from mergekit_bayes.data.rows import Rows
from mergekit_bayes.estimate.run import estimate_precision
from mergekit_bayes.model import load_for_training
from mergekit_bayes.model.base_identity import open_base
from mergekit_bayes.model.tokens import load_tokenizer
from mergekit_bayes.recipe import load_recipe
from mergekit_bayes.recipe.finetune import FinetuneRecipe

REPORT = "finetune_report.json"


@dataclass(frozen=True)
class Run:
    """One output folder of `kind: finetune`."""

    folder: Path
    report: dict[str, Any]
    recipe: FinetuneRecipe

    @property
    def optimizer(self) -> str:
        return str(self.report["optimizer"]["name"])

    @property
    def seed(self) -> int:
        return int(self.report["seeds"]["seed"])

    @property
    def task(self) -> str:
        return str(self.report["task"])

    @property
    def has_posterior(self) -> bool:
        """Whether there are precisions to sample with."""
        return find_sidecar(self.folder) is not None

    @property
    def trained_at(self) -> float | None:
        """The temperature that training sampled at, N / ess; None without a sidecar, or with one that was debiased."""
        if not self.has_posterior:
            return None
        metadata = open_sidecar(self.folder).metadata
        if metadata.debiased:  # its curvature is not the one that training sampled with
            return None
        return metadata.num_examples / metadata.ess if metadata.num_examples and metadata.ess else None


@dataclass(frozen=True)
class HeldOut:
    """The same rows for every run, in the same order."""

    validation: list[dict[str, Tensor]]
    test: list[dict[str, Tensor]]
    labels: tuple[str, ...] | None
    units: dict[str, int]


def open_run(folder: Path) -> Run:
    report = json.loads((folder / REPORT).read_text())
    return Run(folder, report, load_recipe(report["recipe"], expect=FinetuneRecipe))


def held_out(run: Run, validation: Path, test: Path, *, batch_size: int, recipe_dir: Path | None) -> HeldOut:
    """Reads validation and test data as the run would read its own: columns, lengths, templates, order of labels."""
    plain = run.recipe.resolved()
    plain["data"] = {**plain["data"], "eval": [str(validation), str(test)], "eval_fraction": None}  # type: ignore[dict-item]
    recipe = load_recipe(plain, expect=FinetuneRecipe)
    tokenizer = load_tokenizer(_base_folder(run, recipe_dir), reference=recipe.model.path)
    data = load_training_data(recipe.data, tokenizer, task=recipe.model.task, recipe_dir=recipe_dir)
    pad = tokenizer.pad_token_id or 0
    parts = dict(zip(("validation", "test"), data.eval.values(), strict=True))
    batches = {name: _batches(rows, pad, batch_size) for name, rows in parts.items()}
    units = {"train": data.train.num_units, **{name: rows.num_units for name, rows in parts.items()}}
    return HeldOut(batches["validation"], batches["test"], data.labels, units)


def load_model(run: Run, labels: tuple[str, ...] | None, *, device: str, recipe_dir: Path | None) -> nn.Module:
    """The trained model: an adapter on the base in the dtype of the run, or the full model."""
    spec = run.recipe.model
    if run.recipe.adapter is None:
        spec = spec.model_copy(update={"path": str(run.folder)})
    loaded = load_for_training(
        spec, run.recipe.adapter, labels=labels, seed=run.seed, device=device, recipe_dir=recipe_dir
    )
    model: nn.Module = loaded.model
    if run.recipe.adapter is not None:
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        set_peft_model_state_dict(model, load_file(run.folder / "adapter_model.safetensors"))
    return model.eval()


def estimated(run: Run, estimator: str, recipe_dir: Path | None) -> Path:
    """A folder beside the run with its precision by a pass over all of its training data.

    That of the adapter's factors, or for Kronecker factors that of the updates they make.
    """
    folder = run.folder.with_name(f"{run.folder.name}_{estimator}")
    if not folder.exists():
        plain: Any = run.recipe.resolved()
        trained = [each["rows"] for each in run.report["data"]["report"]["datasets"] if each["role"] == "train"]
        content = {
            "kind": "precision",
            "model": plain["model"],
            "adapter": str(run.folder),
            "data": {**plain["data"], "eval": None, "eval_fraction": None},
            "estimator": estimator,
            "num_examples": sum(trained),
            "batch_size": 16,
            "seed": run.seed,
        }
        estimate_precision(content, folder, recipe_dir=recipe_dir)
    return folder


def _base_folder(run: Run, recipe_dir: Path | None) -> Path:
    return open_base(run.recipe.model.path, recipe_dir=recipe_dir)[0].folder


def _batches(rows: Rows, pad_token_id: int, batch_size: int) -> list[dict[str, Tensor]]:
    return [
        collate([rows[index] for index in indices], pad_token_id=pad_token_id, task=rows.task)
        for indices in evaluation_batches(rows, batch_size=batch_size)
    ]


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
