"""The fine-tuning recipe: frozen, checked data; no file is opened to make one.

    kind: finetune
    model: org/base
    adapter: {r: 16}
    data: {train: train.jsonl, eval_fraction: 0.05}
    optimizer: ivon
    training: {num_train_epochs: 2, bf16: true}
    output: {path: tuned}

Each class is one mapping of the recipe and each field one key; unknown keys are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from mergekit_bayes.recipe import field
from mergekit_bayes.recipe.adapter import AdapterSpec, adapter_mapping
from mergekit_bayes.recipe.data import DatasetSpec, DataSpec, data_mapping
from mergekit_bayes.recipe.model import ModelSpec, model_mapping
from mergekit_bayes.recipe.optimizer import AdamWSpec, IvonSpec, OptimizerSpec
from mergekit_bayes.recipe.spec import Recipe, Spec, checked, empty_if_nothing
from mergekit_bayes.recipe.training import TrainingSpec

__all__ = [
    "SPECS",
    "AdamWSpec",
    "AdapterSpec",
    "DataSpec",
    "DatasetSpec",
    "FinetuneOutputSpec",
    "FinetuneRecipe",
    "IvonSpec",
    "ModelSpec",
    "TrainingSpec",
]


class FinetuneOutputSpec(Spec):
    """What is written.

    Attributes:
        path: the folder; the command line's OUT wins over it.
        precision: dtype of the precision sidecar, False for none.
        debias_precision: take what is left of hess_init out of the exported precision.
    """

    path: Annotated[str | None, checked(field.optional(field.text))] = None
    precision: Annotated[Literal["float32", "bfloat16", False], checked(field.stored_precision)] = "float32"
    debias_precision: Annotated[bool, checked(field.boolean)] = True

    def without_effect(self) -> frozenset[str]:
        """Without a sidecar nothing is left to debias."""
        return frozenset({"debias_precision"}) if self.precision is False else frozenset()


class FinetuneRecipe(Recipe):
    """Everything a fine-tuning run was asked for. Made by `load_recipe`.

    Attributes:
        kind: always `finetune`.
        model: the pretrained model.
        adapter: the LoRA factors that are trained; None trains all weights.
        data: what is learned from.
        optimizer: IVON or AdamW.
        training: length, batches, schedule, checkpoints.
        output: where and how to write.
    """

    kind: Literal["finetune"] = "finetune"
    model: Annotated[ModelSpec, BeforeValidator(model_mapping)]
    adapter: Annotated[AdapterSpec | None, BeforeValidator(adapter_mapping)] = None
    data: Annotated[DataSpec, BeforeValidator(data_mapping)]
    optimizer: OptimizerSpec = Field(default_factory=IvonSpec)
    training: Annotated[TrainingSpec, BeforeValidator(empty_if_nothing)] = Field(default_factory=TrainingSpec)
    output: Annotated[FinetuneOutputSpec, BeforeValidator(empty_if_nothing)] = Field(default_factory=FinetuneOutputSpec)


SPECS: Mapping[tuple[str, ...], type[Spec]] = {
    (): FinetuneRecipe,
    ("model",): ModelSpec,
    ("adapter",): AdapterSpec,
    ("data",): DataSpec,
    ("data", "train"): DatasetSpec,
    ("data", "eval"): DatasetSpec,
    ("optimizer", "ivon"): IvonSpec,
    ("optimizer", "adamw"): AdamWSpec,
    ("training",): TrainingSpec,
    ("output",): FinetuneOutputSpec,
}
"""The spec at each place of a recipe, by the names on the way to it; the optimizer's place ends in its name."""
