"""The precision recipe: a posterior for a model or adapter that was trained without one; frozen, checked data.

    kind: precision
    model: org/base
    adapter: tuned/adapter
    data: {train: train.jsonl}
    estimator: {name: kfac, eigenvalues: true}
    num_examples: 1000

Each class is one mapping of the recipe and each field one key; unknown keys are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from mergekit_bayes.recipe import field
from mergekit_bayes.recipe.data import DatasetSpec, DataSpec, data_mapping
from mergekit_bayes.recipe.estimator import EstimatorChoice, estimator_choice
from mergekit_bayes.recipe.model import ModelSpec, model_mapping
from mergekit_bayes.recipe.problem import refusal
from mergekit_bayes.recipe.spec import Recipe, Spec, checked, empty_if_nothing

__all__ = ["PRECISION_SPECS", "EstimatorChoice", "PrecisionOutputSpec", "PrecisionRecipe", "PriorSpec"]


def _adapter(value: object) -> str | None:
    if isinstance(value, Mapping):
        raise refusal("found a mapping; name the folder or hub id of a trained adapter. Nothing is trained here.")
    return None if value is None else field.text(value)


class PriorSpec(Spec):
    """The prior that every precision includes once.

    Attributes:
        weight_decay: L2 rate of the mean loss; the prior precision is S_0 = N weight_decay.
    """

    weight_decay: Annotated[float, checked(field.positive)] = 1e-8


class PrecisionOutputSpec(Spec):
    """What is written.

    Attributes:
        path: the folder of sidecar, report and figure; None: that of the adapter or model. The command line's OUT wins.
        precision: dtype of the sidecar.
    """

    path: Annotated[str | None, checked(field.optional(field.text))] = None
    precision: Annotated[
        Literal["float32", "bfloat16"],
        checked(field.choice("float32", "bfloat16", also={"bf16": "bfloat16", "fp32": "float32"})),
    ] = "float32"


class PrecisionRecipe(Recipe):
    """Everything a precision pass was asked for. Made by `load_recipe`.

    Attributes:
        kind: always `precision`.
        model: the model whose precision is estimated, or the base of the adapter.
        adapter: folder or hub id of the adapter whose precision is estimated; None for the model's own.
        space: what is described: the adapter's `factor`s, its `product` dW, or the `full` model.
        data: what the curvature is that of the loss on; None for an estimator that reads an optimizer.
        estimator: how it is estimated.
        optimizer_state: file or folder with the state of the optimizer, for `adam`.
        num_examples: rows of the data that are looked at, at most.
        training_units: N, the training units that the curvature is scaled to; None: those that were looked at.
        prior: what is known without data.
        batch_size: rows looked at together; for `adam`, training units per optimizer step.
        max_skipped: largest share of rows that may be skipped because their gradients are not finite.
        max_memory: bytes for what is summed up; more is estimated in several passes. None: a share of what is free.
        seed: of the rows and of what is drawn for them.
        output: where and how to write.
    """

    kind: Literal["precision"] = "precision"
    model: Annotated[ModelSpec, BeforeValidator(model_mapping)]
    adapter: Annotated[str | None, checked(_adapter)] = None
    space: Annotated[
        Literal["factor", "product", "full"] | None,
        checked(field.optional(field.choice("factor", "product", "full", also={"factors": "factor"}))),
    ] = None
    data: Annotated[DataSpec | None, BeforeValidator(lambda value: None if value is None else data_mapping(value))] = (
        None
    )
    estimator: Annotated[EstimatorChoice, checked(estimator_choice)]
    optimizer_state: Annotated[str | None, checked(field.optional(field.text))] = None
    num_examples: Annotated[int, checked(field.integer(1))] = 1000
    training_units: Annotated[int | None, checked(field.optional(field.integer(1)))] = None
    prior: Annotated[PriorSpec, BeforeValidator(empty_if_nothing)] = Field(default_factory=PriorSpec)
    batch_size: Annotated[int, checked(field.integer(1))] = 8
    max_skipped: Annotated[float, checked(field.between(0, 1, below=True))] = 0.01
    max_memory: Annotated[int | None, checked(field.optional(field.size))] = None
    seed: Annotated[int, checked(field.integer(0, 2**63 - 1))] = 0
    output: Annotated[PrecisionOutputSpec, BeforeValidator(empty_if_nothing)] = Field(
        default_factory=PrecisionOutputSpec
    )

    def without_effect(self) -> frozenset[str]:
        """The state of an optimizer has its own rows, seed and size."""
        return STATE_SILENCES if self.estimator.name == "adam" else frozenset()


STATE_SILENCES = frozenset({"num_examples", "max_skipped", "max_memory", "seed"})
"""What means nothing to an estimator that is shown no data."""

PRECISION_SPECS: Mapping[tuple[str, ...], type[Spec]] = {
    (): PrecisionRecipe,
    ("model",): ModelSpec,
    ("data",): DataSpec,
    ("data", "train"): DatasetSpec,
    ("data", "eval"): DatasetSpec,
    ("prior",): PriorSpec,
    ("output",): PrecisionOutputSpec,
}
"""The spec at each place of a recipe, by the names on the way to it."""
