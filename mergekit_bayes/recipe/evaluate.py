"""The evaluation recipe: how good models are, and how sure of it one can be; frozen, checked data.

    kind: evaluate
    models: [models/base, tuned/code, {name: merged, merge: merge.yaml}]
    data: held_out/code.jsonl
    samples: {count: 8, temperature: 0.1}
    output: {path: scores}

Each class is one mapping of the recipe and each field one key; unknown keys are refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from mergekit_bayes.recipe import field
from mergekit_bayes.recipe.data import DatasetSpec
from mergekit_bayes.recipe.evaluation_data import EvaluationDataSpec, evaluation_data_mapping
from mergekit_bayes.recipe.harness import HarnessSpec, harness_mapping
from mergekit_bayes.recipe.model import TrainingDType
from mergekit_bayes.recipe.problem import refusal, show
from mergekit_bayes.recipe.reference import model_reference
from mergekit_bayes.recipe.spec import Entries, Recipe, Spec, checked, empty_if_nothing

__all__ = [
    "EVALUATE_SPECS",
    "METRICS",
    "EvaluateOutputSpec",
    "EvaluateRecipe",
    "EvaluatedSpec",
    "IntervalSpec",
    "SamplesSpec",
]

EvaluatedTask: TypeAlias = Literal["causal_lm", "sequence_classification", "multiple_choice"]

OF_MODELS_ON_DISK = ("base_model", "precision")
"""Keys of a model that mean nothing for a merge in memory."""

OF_ROWS = ("max_rows", "validation", "metrics", "coverage", "samples", "prune", "baseline", "intervals", "bins")
"""Keys that mean nothing without `data`."""

METRICS: Mapping[str, tuple[str, ...]] = {
    "causal_lm": ("loss", "perplexity", "bits_per_byte"),
    "sequence_classification": ("accuracy", "nll", "ece", "brier", "selective_accuracy"),
    "multiple_choice": ("accuracy", "normalised_accuracy", "nll", "ece", "brier", "selective_accuracy"),
}
"""What models of each task are judged by, in the order of tables."""

_SAME_METRICS = {
    "acc": "accuracy",
    "acc_norm": "normalised_accuracy",
    "normalized_accuracy": "normalised_accuracy",
    "ppl": "perplexity",
    "bpb": "bits_per_byte",
    "selective": "selective_accuracy",
}

_task = field.choice(
    *METRICS,
    also={
        "lm": "causal_lm",
        "text-generation": "causal_lm",
        "classification": "sequence_classification",
        "text-classification": "sequence_classification",
        "seq_cls": "sequence_classification",
        "multiple-choice": "multiple_choice",
        "mcq": "multiple_choice",
    },
)
_metric = field.choice(*dict.fromkeys(name for names in METRICS.values() for name in names), also=_SAME_METRICS)
_share = field.between(0, 1, above=True)


def _metrics(value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    return tuple(dict.fromkeys(field.several(_metric)(names)))


def _shares(value: object) -> tuple[float, ...]:
    if value is None:
        return ()
    shares = [value] if isinstance(value, int | float) else value
    return tuple(sorted(set(field.several(_share)(shares))))


def _temperature(value: object) -> float | Literal["validation"]:
    if isinstance(value, str):
        if value != "validation":
            raise refusal(f"expected a number or `validation`, found {show(value)}.")
        return "validation"
    return field.between(0, above=True)(value)


def _precision(value: object) -> str | Literal[False] | None:
    if value is None or value is False:
        return value
    if value is True:
        raise refusal("found true; leave it out to use the sidecar beside the model, or name another one.")
    return field.text(value)


class SamplesSpec(Spec):
    """Predictions averaged over samples of the posterior.

    Attributes:
        count: samples; their probabilities are averaged.
        temperature: of their variance, on the scale of the data: 1 is the posterior. `validation` for the one with the
            lowest loss on the rows of `validation`.
        prior: precision S_0 where the data say nothing, at data scale, in place of the one the sidecar has; None for
            that one.
    """

    count: Annotated[int, checked(field.integer(1))] = 8
    temperature: Annotated[float | Literal["validation"], checked(_temperature)] = 1.0
    prior: Annotated[float | None, checked(field.optional(field.positive))] = None


def _samples(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return {"count": value}
    return value


def _own_samples(value: object) -> object:
    """Of one model: `false` for none, nothing for those of the recipe."""
    if value is False:
        return False
    if value is True:
        raise refusal("found true; leave it out for the recipe's `samples`, or write `false` for none.")
    return _samples(value)


def _merge(value: object) -> str | Entries[object] | None:
    """A path, or a merge recipe written out, which is checked where merge methods are known."""
    if value is None or isinstance(value, Entries):
        return value
    if isinstance(value, Mapping):
        return Entries(tuple(value.items()))
    if isinstance(value, bool | int | float | list | tuple):
        raise refusal(f"expected the path of a merge recipe, or the recipe itself as a mapping, found {show(value)}.")
    return field.text(value)


class EvaluatedSpec(Spec):
    """One model: one that lies somewhere (`model`), or a merge that is made in memory (`merge`).

    Attributes:
        model: folder or hub id of a model, of an adapter or of the output of a merge, `[@revision][+adapter]`.
        merge: path of a merge recipe, or that recipe written out; it is evaluated at its mean and not written.
        name: what tables call it; None for the reference or the path itself.
        base_model: of an adapter; None for the recipe's, else what the adapter's own configuration names.
        precision: path of its sidecar; None for the one beside it, False for none.
        samples: False to look at its mean only.
    """

    model: Annotated[str | None, checked(field.optional(model_reference))] = None
    merge: Annotated[str | Entries[object] | None, checked(_merge)] = None
    name: Annotated[str | None, checked(field.optional(field.text))] = None
    base_model: Annotated[str | None, checked(field.optional(field.text))] = None
    precision: Annotated[str | Literal[False] | None, checked(_precision)] = None
    samples: Annotated[SamplesSpec | Literal[False] | None, BeforeValidator(_own_samples)] = None

    @property
    def title(self) -> str:
        """What tables call it."""
        return self.name or self.model or str(self.merge)

    def without_effect(self) -> frozenset[str]:
        """What a merge recipe says itself."""
        return frozenset() if self.merge is None else frozenset(OF_MODELS_ON_DISK)


class IntervalSpec(Spec):
    """Bootstrap intervals of scores and of differences between models.

    Attributes:
        level: coverage.
        resamples: how often rows are resampled.
    """

    level: Annotated[float, checked(field.between(0, 1, above=True, below=True))] = 0.95
    resamples: Annotated[int, checked(field.integer(100))] = 4000


class EvaluateOutputSpec(Spec):
    """What is written.

    Attributes:
        path: the folder of results, rows and figures; None for none. The command line's OUT wins over it.
    """

    path: Annotated[str | None, checked(field.optional(field.text))] = None


def _models(value: object) -> object:
    entries = [value] if isinstance(value, str | os.PathLike | Mapping | EvaluatedSpec) else value
    if not isinstance(entries, list | tuple):
        expected = "expected a list of models, each a reference, `- model: ...` or `- merge: ...`"
        raise refusal(f"{expected}, found {show(value)}.")
    if not entries:
        raise refusal("found no model; an evaluation has at least one.")
    return [{"model": entry} if isinstance(entry, str | os.PathLike) else entry for entry in entries]


def _data(value: object) -> object:
    return None if value is None else evaluation_data_mapping(value)


class EvaluateRecipe(Recipe):
    """Everything an evaluation was asked for. Made by `load_recipe`.

    Attributes:
        kind: always `evaluate`.
        models: what is evaluated, in the order of tables.
        base_model: of adapters that name no other; None for what their configurations name.
        task: what the models do; None for `multiple_choice` where that is the format of data, else for what the
            models say themselves.
        data: rows to evaluate on; every data set has scores of its own. None for the tasks of `lm_eval` alone.
        lm_eval: tasks of lm-eval-harness that models are put to at their mean; None for none.
        max_rows: evaluate only so many rows of each data set, evenly spread over all of them; None for all.
        validation: rows to choose the temperature of samples on; None without that choice.
        metrics: what is reported; None for all of the task.
        coverage: for `selective_accuracy`, shares of the rows that are kept, those a model is surest of.
        samples: also predict by samples of the posterior; None for means only.
        prune: also evaluate the mean with these shares of its weights pruned, those that the data say least about.
        baseline: name of the model that the others are compared with; None for the first.
        intervals: of scores and differences.
        bins: of the calibration error and the reliability diagram.
        batch_size: rows in one forward pass, a question's choices one each; those of a question stay together.
        dtype: what models compute in; None for what they are stored as.
        seed: of samples and resampling.
        output: where to write.
    """

    kind: Literal["evaluate"] = "evaluate"
    models: Annotated[tuple[EvaluatedSpec, ...], BeforeValidator(_models)]
    base_model: Annotated[str | None, checked(field.optional(field.text))] = None
    task: Annotated[EvaluatedTask | None, checked(field.optional(_task))] = None
    data: Annotated[EvaluationDataSpec | None, BeforeValidator(_data)] = None
    lm_eval: Annotated[HarnessSpec | None, BeforeValidator(harness_mapping)] = None
    max_rows: Annotated[int | None, checked(field.optional(field.integer(1)))] = None
    validation: Annotated[EvaluationDataSpec | None, BeforeValidator(_data)] = None
    metrics: Annotated[tuple[str, ...] | None, checked(_metrics)] = None
    coverage: Annotated[tuple[float, ...], checked(_shares)] = (0.8,)
    samples: Annotated[SamplesSpec | None, BeforeValidator(_samples)] = None
    prune: Annotated[tuple[float, ...], checked(_shares)] = ()
    baseline: Annotated[str | None, checked(field.optional(field.text))] = None
    intervals: Annotated[IntervalSpec, BeforeValidator(empty_if_nothing)] = Field(default_factory=IntervalSpec)
    bins: Annotated[int, checked(field.integer(1, 1000))] = 15
    batch_size: Annotated[int, checked(field.integer(1))] = 16
    dtype: Annotated[TrainingDType | None, checked(field.optional(field.choice("bfloat16", "float16", "float32")))] = (
        "float32"
    )
    seed: Annotated[int, checked(field.integer(0, 2**63 - 1))] = 0
    output: Annotated[EvaluateOutputSpec, BeforeValidator(empty_if_nothing)] = Field(default_factory=EvaluateOutputSpec)

    def without_effect(self) -> frozenset[str]:
        """What is about rows, where there are none; `coverage` where nobody asks for it."""
        if self.data is None:
            return frozenset(OF_ROWS)
        asked = self.metrics is None or "selective_accuracy" in self.metrics
        return frozenset() if asked else frozenset({"coverage"})

    def samples_of(self, model: EvaluatedSpec) -> SamplesSpec | None:
        """The samples of one model; None for its mean alone."""
        if model.samples is None:
            return self.samples
        return model.samples or None

    @property
    def told_task(self) -> EvaluatedTask | None:
        """What the models do as far as the recipe says it; None where only they know."""
        entries = () if self.data is None else self.data.eval
        if self.task is None and any(entry.format == "multiple_choice" for entry in entries):
            return "multiple_choice"
        return self.task

    @property
    def baseline_title(self) -> str:
        """Name of the model that the others are compared with."""
        return self.baseline or self.models[0].title


EVALUATE_SPECS: Mapping[tuple[str, ...], type[Spec]] = {
    (): EvaluateRecipe,
    ("models",): EvaluatedSpec,
    ("models", "samples"): SamplesSpec,
    ("data",): EvaluationDataSpec,
    ("data", "eval"): DatasetSpec,
    ("lm_eval",): HarnessSpec,
    ("validation",): EvaluationDataSpec,
    ("validation", "eval"): DatasetSpec,
    ("samples",): SamplesSpec,
    ("intervals",): IntervalSpec,
    ("output",): EvaluateOutputSpec,
}
"""The spec at each place of a recipe, by the names on the way to it."""
