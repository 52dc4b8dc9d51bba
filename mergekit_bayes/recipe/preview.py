"""The preview recipe: which weights; frozen, checked data, no file is opened to make one.

    kind: preview
    base_model: models/base
    models:
      - model: tuned/code
      - model: tuned/prose
    methods: [task_arithmetic, gradient_matching]
    tasks:
      - {model: tuned/code, data: held_out/code.jsonl}
      - {model: tuned/prose, data: held_out/prose.jsonl}
    design: {kind: simplex, step: 0.1}
    output: {path: preview}

Each class is one mapping of the recipe and each field one key; unknown keys are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field, PlainValidator, ValidationInfo, model_validator

from mergekit_bayes.recipe import field
from mergekit_bayes.recipe.data import DatasetSpec
from mergekit_bayes.recipe.design import BudgetSpec, DesignSpec, design_mapping
from mergekit_bayes.recipe.evaluation_data import EvaluationDataSpec, evaluation_data_mapping
from mergekit_bayes.recipe.harness import HarnessSpec, harness_mapping
from mergekit_bayes.recipe.merge import DType, PrecisionSpec, SourceSpec
from mergekit_bayes.recipe.model import TrainingDType
from mergekit_bayes.recipe.parameters import Parameters, parse_parameters
from mergekit_bayes.recipe.problem import refusal, show
from mergekit_bayes.recipe.reference import model_reference
from mergekit_bayes.recipe.spec import Entries, Recipe, Spec, checked, empty_if_nothing

__all__ = [
    "FIRST_METRIC",
    "PREVIEW_SPECS",
    "EvaluationSpec",
    "MethodSpec",
    "PreviewOutputSpec",
    "PreviewRecipe",
    "ReferenceSpec",
    "TaskSpec",
]

FIRST_METRIC = "first"
"""Stands for the `acc` of a task of lm-eval-harness, else for the first of its metrics."""

Fidelity: TypeAlias = Literal["surrogate", "fitted", "evaluated"]
Space: TypeAlias = Literal["product", "factor", "full"]
Scale: TypeAlias = Literal["sum", "mean"]

_space = field.optional(field.choice("product", "factor", "full"))
_scale = field.optional(field.choice("sum", "mean"))
_fidelity = field.choice("surrogate", "fitted", "evaluated", also={"evaluate": "evaluated", "fit": "fitted"})


_spread = field.choice("auto", "balanced", "balanced_low_0", "sequential")


def _device_map(value: object) -> str | Entries[str] | None:
    if not isinstance(value, Mapping):
        return None if value is None else _spread(value)
    named = {
        key: str(each) if isinstance(each, int) and not isinstance(each, bool) else each for key, each in value.items()
    }
    return field.entries(field.text)(named)


def _parameters(value: object) -> Parameters:
    return parse_parameters(value, None, per_source=False)


def _several_methods(value: object) -> object:
    if value is None:
        return ()
    if isinstance(value, str | Mapping | MethodSpec):
        value = [value]
    if not isinstance(value, list | tuple) or not value:
        raise refusal(f"expected a list of methods, found {show(value)}.")
    return [{"merge_method": entry} if isinstance(entry, str) else entry for entry in value]


def _fidelities(value: object) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    return tuple(dict.fromkeys(field.several(_fidelity)(names)))


def _listed(what: str) -> BeforeValidator:
    def check(value: object) -> object:
        if not isinstance(value, list | tuple) or not value:
            raise refusal(f"expected a list of {what}, found {show(value)}.")
        return value

    return BeforeValidator(check)


class MethodSpec(Spec):
    """One method whose mixes are looked at; what it leaves open is as in the recipe as a whole.

    Attributes:
        merge_method: name or alias of a registered method.
        name: what plots and tables call it; None for the method's own name.
        parameters: what the method takes besides weights.
        space: what of a LoRA adapter is merged.
        scale: whether a source's precision counts its data (`sum`) or is per unit of data (`mean`).
        precision: prior and floor.
    """

    merge_method: Annotated[str, checked(field.text)]
    name: Annotated[str | None, checked(field.optional(field.text))] = None
    parameters: Annotated[Parameters, checked(_parameters)] = Parameters()
    space: Annotated[Space | None, checked(_space)] = None
    scale: Annotated[Scale | None, checked(_scale)] = None
    precision: Annotated[PrecisionSpec | None, BeforeValidator(lambda value: value)] = None

    @property
    def title(self) -> str:
        """What plots and tables call it."""
        return self.name or self.merge_method


_metric = field.choice("loss", "perplexity", "accuracy", also={"nll": "loss", "ppl": "perplexity", "acc": "accuracy"})


def _task_metric(value: object, info: ValidationInfo) -> str:
    """Of the harness, whatever its task has; `lm_eval` is absent where it was refused itself."""
    rows = "lm_eval" in info.data and info.data["lm_eval"] is None
    return _metric(value) if rows else field.text(value)


def _one_harness_task(value: object) -> object:
    found = harness_mapping(value)
    tasks = found.get("tasks") if isinstance(found, Mapping) else None
    if isinstance(found, Mapping) and (tasks is None or (isinstance(tasks, list | tuple) and len(tasks) != 1)):
        raise refusal(f"expected one task of lm-eval-harness, found {show(tasks)}; a preview lists others beside it.")
    return found


class TaskSpec(Spec):
    """One task: the model that was trained for it, and what it is judged by.

    Attributes:
        name: what plots and tables call it; None for the last part of the model's name.
        model: its expert, one of `models`; None for the model at the same place of the list.
        data: rows to evaluate on; None where nothing is evaluated.
        lm_eval: a task of lm-eval-harness to evaluate on in place of rows, its name or how it is asked.
        metric: `loss` (nats per unit), `perplexity` of language models, or `accuracy`; of the harness any metric of its
            task, `first` for its `acc`, else its first.
        better: whether `lower` or `higher` scores are better; None for what the metric says.
        max_rows: evaluate only so many rows, evenly spread over all of them.
    """

    name: Annotated[str | None, checked(field.optional(field.text))] = None
    model: Annotated[str | None, checked(field.optional(model_reference))] = None
    data: Annotated[
        EvaluationDataSpec | None,
        BeforeValidator(lambda value: None if value is None else evaluation_data_mapping(value)),
    ] = None
    lm_eval: Annotated[HarnessSpec | None, BeforeValidator(_one_harness_task)] = None
    metric: Annotated[str, PlainValidator(_task_metric)] = "loss"
    better: Annotated[
        Literal["lower", "higher"] | None,
        checked(field.optional(field.choice("lower", "higher", also={"less": "lower", "more": "higher"}))),
    ] = None
    max_rows: Annotated[int | None, checked(field.optional(field.integer(1)))] = None

    @model_validator(mode="before")
    @classmethod
    def _metric_of_the_harness(cls, data: object) -> object:
        if isinstance(data, Mapping) and data.get("lm_eval") is not None and data.get("metric") is None:
            return {**data, "metric": FIRST_METRIC}
        return data

    def without_effect(self) -> frozenset[str]:
        """A task of the harness has documents of its own."""
        return frozenset() if self.lm_eval is None else frozenset({"data", "max_rows"})

    @property
    def higher_is_better(self) -> bool:
        """Whether more is better."""
        return self.better == "higher" if self.better is not None else self.metric == "accuracy"


class EvaluationSpec(Spec):
    """How models are evaluated.

    Attributes:
        task: `causal_lm` (next tokens) or `sequence_classification` (one label per text).
        batch_size: rows in one forward pass, of all mixes that share it.
        mixes_per_batch: mixes that share a forward pass, where the method and the sources allow it.
        dtype: what models compute in.
        device: where; None for the accelerator of this process if there is one.
        device_map: for a model that is too large for one device, how Accelerate spreads it over those of one process:
            `auto`, `balanced`, `balanced_low_0`, `sequential`, or a device (also `cpu`, `disk`) for each part of it.
        max_memory: bytes of sources kept in memory for merges between evaluations; beyond it they are read again.
    """

    task: Annotated[
        Literal["causal_lm", "sequence_classification"], checked(field.choice("causal_lm", "sequence_classification"))
    ] = "causal_lm"
    batch_size: Annotated[int, checked(field.integer(1))] = 16
    mixes_per_batch: Annotated[int, checked(field.integer(1, 1024))] = 4
    dtype: Annotated[TrainingDType, checked(field.choice("bfloat16", "float16", "float32"))] = "float32"
    device: Annotated[str | None, checked(field.optional(field.text))] = None
    device_map: Annotated[str | Entries[str] | None, checked(_device_map)] = None
    max_memory: Annotated[int, checked(field.size)] = 4 * 10**9


class ReferenceSpec(Spec):
    """A real run to compare the preview with, such as fine-tuning on a mixture of all tasks.

    Attributes:
        name: what plots and tables call it.
        weights: the mix it stands for, one weight per model; None for none.
        scores: by the names of tasks, in their metric; empty where `model` is evaluated.
        model: what the run made, a checkpoint or adapter of the same base, scored like the mixes; None for `scores`.
        minutes: what it cost; None for what the folder of `model` says, if anything.
    """

    name: Annotated[str, checked(field.text)]
    weights: Annotated[tuple[float, ...] | None, checked(field.optional(field.several(field.number)))] = None
    scores: Annotated[Entries[float], checked(field.entries(field.number))] = Entries()
    model: Annotated[str | None, checked(field.optional(model_reference))] = None
    minutes: Annotated[float | None, checked(field.optional(field.positive))] = None


class PreviewOutputSpec(Spec):
    """What is written.

    Attributes:
        path: the folder; the command line's OUT wins over it.
        rank: rank of merged adapters in product space; None keeps the exact stack.
        html: whether to write an interactive page as well, which needs plotly.
    """

    path: Annotated[str | None, checked(field.optional(field.text))] = None
    rank: Annotated[int | None, checked(field.optional(field.integer(1)))] = None
    html: Annotated[bool, checked(field.boolean)] = False


class PreviewRecipe(Recipe):
    """Everything a preview was asked for. Made by `load_recipe`, which also knows the methods.

    Attributes:
        kind: always `preview`.
        base_model: the shared pretrained checkpoint theta_0.
        models: the sources, in the order of the recipe; the design gives their weights.
        merge_method: the one method, where `methods` does not list several.
        methods: methods that are compared.
        parameters: of the one method.
        dtype: what the inputs are read as; None keeps each tensor's own.
        out_dtype: what a merge would be written as; None for `dtype`, else the base's.
        space: what of a LoRA adapter is merged; None lets the plan choose.
        scale: whether a source's precision counts its data (`sum`) or is per unit of data (`mean`).
        precision: prior and floor.
        tasks: what mixes are judged by, at least two.
        design: which mixes.
        budget: how much is evaluated at most.
        fidelity: what scores come from, each of `surrogate` (the posteriors, no data), `evaluated` (the models) and
            `fitted` (polynomials through evaluated mixes).
        evaluation: how models are evaluated.
        references: real runs to compare with.
        output: where to write.
        seed: of everything random.
    """

    kind: Literal["preview"] = "preview"
    base_model: Annotated[str, checked(model_reference)]
    models: Annotated[tuple[SourceSpec, ...], _listed("models, each `- model: ...`")]
    merge_method: Annotated[str | None, checked(field.optional(field.text))] = None
    methods: Annotated[tuple[MethodSpec, ...], BeforeValidator(_several_methods)] = ()
    parameters: Annotated[Parameters, checked(_parameters)] = Parameters()
    dtype: Annotated[DType | None, checked(field.optional(field.dtype))] = None
    out_dtype: Annotated[DType | None, checked(field.optional(field.dtype))] = None
    space: Annotated[Space | None, checked(_space)] = None
    scale: Annotated[Scale, checked(field.choice("sum", "mean"))] = "mean"
    precision: Annotated[PrecisionSpec, BeforeValidator(empty_if_nothing)] = Field(default_factory=PrecisionSpec)
    tasks: Annotated[tuple[TaskSpec, ...], _listed("tasks, each `- {name: ..., data: ...}`")]
    design: Annotated[DesignSpec, BeforeValidator(design_mapping)] = Field(default_factory=DesignSpec)
    budget: Annotated[BudgetSpec, BeforeValidator(empty_if_nothing)] = Field(default_factory=BudgetSpec)
    fidelity: Annotated[tuple[Fidelity, ...], checked(_fidelities)] = ("surrogate", "evaluated")
    evaluation: Annotated[EvaluationSpec, BeforeValidator(empty_if_nothing)] = Field(default_factory=EvaluationSpec)
    references: tuple[ReferenceSpec, ...] = ()
    output: Annotated[PreviewOutputSpec, BeforeValidator(empty_if_nothing)] = Field(default_factory=PreviewOutputSpec)
    seed: Annotated[int, checked(field.integer(0))] = 0

    @property
    def compared(self) -> tuple[MethodSpec, ...]:
        """The methods, as a list also where there is one."""
        if self.merge_method is None:
            return self.methods
        return (MethodSpec.model_construct(merge_method=self.merge_method, parameters=self.parameters),)

    @property
    def experts(self) -> tuple[int, ...]:
        """For every task, the place of its expert among the models."""
        places = {source.model: index for index, source in enumerate(self.models)}
        return tuple(index if task.model is None else places[task.model] for index, task in enumerate(self.tasks))

    @property
    def task_names(self) -> tuple[str, ...]:
        """What plots and tables call the tasks."""
        names = zip(self.tasks, self.experts, strict=True)
        return tuple(task.name or PurePath(self.models[expert].model).name for task, expert in names)

    def merge_of(self, method: MethodSpec, mix: Sequence[float]) -> dict[str, object]:
        """The merge recipe of one mix, as plain data that `load_recipe` reads.

        Args:
            method: one of `compared`.
            mix: one weight per model.
        """
        return merge_mapping(self.plain(), method.plain(), mix)


def merge_mapping(
    recipe: Mapping[str, object], method: Mapping[str, object], mix: Sequence[float]
) -> dict[str, object]:
    """The merge recipe of one mix of a preview, all of them plain data; what is faulty stays faulty.

    Args:
        recipe: the preview.
        method: an entry of its `methods`.
        mix: one weight per model.
    """
    shared = {key: recipe[key] for key in ("base_model", "dtype", "out_dtype", "seed") if key in recipe}
    chosen = {key: method.get(key, recipe.get(key)) for key in ("space", "scale", "precision")}
    models = recipe.get("models")
    sources = list(models) if isinstance(models, list | tuple) else []
    weighted = [_weighted(source, weight) for source, weight in zip(sources, mix, strict=False)]
    output = recipe.get("output")
    rank = output.get("rank") if isinstance(output, Mapping) else None
    scale = {} if chosen["scale"] is not None else {"scale": "mean"}
    return {
        "merge_method": method.get("merge_method"),
        **shared,
        "models": weighted,
        **({"parameters": method["parameters"]} if method.get("parameters") else {}),
        **{key: value for key, value in chosen.items() if value is not None},
        **scale,
        **({"output": {"rank": rank}} if rank is not None else {}),
    }


def _weighted(source: object, weight: float) -> object:
    if not isinstance(source, Mapping):
        return source
    own = source.get("parameters")
    return {**source, "parameters": {**(own if isinstance(own, Mapping) else {}), "weight": weight}}


PREVIEW_SPECS: Mapping[tuple[str, ...], type[Spec]] = {
    (): PreviewRecipe,
    ("models",): SourceSpec,
    ("methods",): MethodSpec,
    ("methods", "precision"): PrecisionSpec,
    ("precision",): PrecisionSpec,
    ("tasks",): TaskSpec,
    ("tasks", "lm_eval"): HarnessSpec,
    ("tasks", "data"): EvaluationDataSpec,
    ("tasks", "data", "eval"): DatasetSpec,
    ("design",): DesignSpec,
    ("budget",): BudgetSpec,
    ("evaluation",): EvaluationSpec,
    ("references",): ReferenceSpec,
    ("output",): PreviewOutputSpec,
}
"""The spec at each place of a recipe, by the names on the way to it."""
