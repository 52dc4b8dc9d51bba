"""The merge recipe: frozen, checked data; no file is opened to make one.

    merge_method: gradient_matching
    base_model: models/base
    models:
      - model: models/code
        parameters: {weight: 0.7}
      - model: models/prose
        parameters: {weight: 0.5}
    dtype: bfloat16

Each class is one mapping of the recipe and each field one key; unknown keys are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from pydantic import BeforeValidator, Field, PlainValidator, ValidationInfo

from mergekit_bayes.recipe import field
from mergekit_bayes.recipe.mergekit_words import METHODS
from mergekit_bayes.recipe.method_schema import MethodSchema, find_method, method_words
from mergekit_bayes.recipe.parameters import Parameters, parse_parameters
from mergekit_bayes.recipe.problem import did_you_mean, refusal, show
from mergekit_bayes.recipe.reference import model_reference
from mergekit_bayes.recipe.scalar import Scalar
from mergekit_bayes.recipe.spec import Recipe, Spec, checked, empty_if_nothing

DType: TypeAlias = Literal["bfloat16", "float16", "float32", "float64"]


@dataclass(frozen=True)
class MethodContext:
    """What validation knows about methods: all of them, and the one this recipe names (None: unknown)."""

    methods: tuple[MethodSchema, ...]
    method: MethodSchema | None


def _method_of(info: ValidationInfo) -> MethodSchema | None:
    return info.context.method if isinstance(info.context, MethodContext) else None


def _merge_method(value: object, info: ValidationInfo) -> str:
    name = field.text(value)
    if not isinstance(info.context, MethodContext) or find_method(info.context.methods, name):
        return name
    listing = " `bayes-merge methods` lists those there are."
    if name in METHODS:
        raise refusal(f"`{name}` is a method of mergekit that is not implemented here.{listing}")
    hint = did_you_mean(name, method_words(info.context.methods))
    raise refusal(f"no merge method is called {show(name)}.{hint or listing}")


def _shared_parameters(value: object, info: ValidationInfo) -> Parameters:
    return parse_parameters(value, _method_of(info), per_source=False)


def _source_parameters(value: object, info: ValidationInfo) -> Parameters:
    return parse_parameters(value, _method_of(info), per_source=True)


def _source_precision(value: object) -> str | float | Literal[False] | None:
    if value is None or value is False:
        return value
    if value is True or isinstance(value, list | tuple | Mapping):
        raise refusal("expected a path, a number or false; a sidecar beside the model is used by itself.")
    return field.text(value) if not isinstance(value, int | float) else field.positive(value)


def _prior(value: object) -> float | str | None:
    if value is None:
        return None
    if isinstance(value, bool | list | tuple | Mapping):
        raise refusal(f"expected a number or the path of a sidecar, found {show(value)}.")
    return field.positive(value) if isinstance(value, int | float) else field.text(value)


def _normalise(value: object) -> Literal["trace"] | None:
    if value is None or value is False:
        return None
    if value == "trace":
        return "trace"
    raise refusal(f"expected trace or false, found {show(value)}.")


def _models(value: object) -> object:
    if not isinstance(value, list | tuple):
        raise refusal(f"expected a list of models, each `- model: ...`, found {show(value)}.")
    if not value:
        raise refusal("an empty list; a merge needs at least one model.")
    return value


class SourceSpec(Spec):
    """One input of a merge.

    Attributes:
        model: a folder or hub id, with `@revision` and `+adapter` as wanted.
        parameters: `weight` and whatever else the method takes per source.
        precision: None for the sidecar beside the model if there is one, a path to a sidecar, a number for
            the same precision everywhere, or False to ignore a sidecar.
        task: name of the task it was trained for; models of one task are components of one mixture, for methods that
            know mixtures.
    """

    model: Annotated[str, checked(model_reference)]
    parameters: Annotated[Parameters, PlainValidator(_source_parameters)] = Parameters()
    precision: Annotated[str | float | Literal[False] | None, checked(_source_precision)] = None
    task: Annotated[str | None, checked(field.optional(field.text))] = None


class PrecisionSpec(Spec):
    """Precisions that are not the sources' own.

    Attributes:
        prior: prior_precision S_0 as one number or as the path of the base's sidecar; None for the base's own
            sidecar if it has one, else what the sources' sidecars agree on.
        floor: the merged precision is raised to at least this; without it, one that is not positive is an
            error.
        normalise: `trace` divides the curvature of every source so that all have the same mean over the entries that
            their sidecars cover; None keeps them as they are.
        source_floor: every source's own precision is raised to at least this, at the scale of the merge.
    """

    prior: Annotated[float | str | None, checked(_prior)] = None
    floor: Annotated[float | None, checked(field.optional(field.positive))] = None
    normalise: Annotated[Literal["trace"] | None, checked(_normalise)] = None
    source_floor: Annotated[float | None, checked(field.optional(field.positive))] = None


class OutputSpec(Spec):
    """What is written.

    Attributes:
        path: the folder; the command line's OUT wins over it.
        max_shard_size: bytes per weight file.
        rank: rank of a merged adapter in product space; None keeps the exact stack.
        precision: dtype of the merged sidecar, False for none.
    """

    path: Annotated[str | None, checked(field.optional(field.text))] = None
    max_shard_size: Annotated[int, checked(field.size)] = 5 * 10**9
    rank: Annotated[int | None, checked(field.optional(field.integer(1)))] = None
    precision: Annotated[Literal["float32", "bfloat16", False], checked(field.stored_precision)] = "float32"


class MergeRecipe(Recipe):
    """Everything a merge was asked for. Made by `load_recipe`, which also knows the methods.

    Attributes:
        kind: always `merge`.
        merge_method: name or alias of a registered method.
        base_model: the shared pretrained checkpoint theta_0.
        models: the sources, in the order of the recipe.
        parameters: values for all sources and for the method as a whole; a source's own value goes first.
        dtype: what the inputs are read as (mergekit's meaning); None keeps each tensor's own.
        out_dtype: what is written; None for `dtype`, else the base's.
        space: what of a LoRA adapter is merged; None lets the plan choose.
        scale: whether a source's precision counts its data (`sum`) or is per unit of data (`mean`).
        precision: prior and floor.
        output: where and how to write.
        seed: of everything random in the merge.
    """

    kind: Literal["merge"] = "merge"
    merge_method: Annotated[str, PlainValidator(_merge_method)]
    base_model: Annotated[str | None, checked(field.optional(model_reference))] = None
    models: Annotated[tuple[SourceSpec, ...], BeforeValidator(_models)]
    parameters: Annotated[Parameters, PlainValidator(_shared_parameters)] = Parameters()
    dtype: Annotated[DType | None, checked(field.optional(field.dtype))] = None
    out_dtype: Annotated[DType | None, checked(field.optional(field.dtype))] = None
    space: Annotated[
        Literal["product", "factor", "full"] | None,
        checked(field.optional(field.choice("product", "factor", "full"))),
    ] = None
    scale: Annotated[Literal["sum", "mean"], checked(field.choice("sum", "mean"))] = "sum"
    precision: Annotated[PrecisionSpec, BeforeValidator(empty_if_nothing)] = Field(default_factory=PrecisionSpec)
    output: Annotated[OutputSpec, BeforeValidator(empty_if_nothing)] = Field(default_factory=OutputSpec)
    seed: Annotated[int, checked(field.integer(0))] = 0

    def setting(self, name: str, *, tensor_name: str, t: float, source: int | None = None) -> Scalar | None:
        """A parameter's value for one tensor: the source's own, else the recipe's; None when neither sets it.

        Args:
            name: the parameter, such as `weight`.
            tensor_name: the tensor's full name in the base checkpoint.
            t: position of its layer, 0 to 1 (`layer_positions`).
            source: index into `models`; None for a parameter of the merge as a whole.
        """
        scopes = [self.parameters] if source is None else [self.models[source].parameters, self.parameters]
        values = (scope.at(name, tensor_name, t) for scope in scopes)
        return next((value for value in values if value is not None), None)


SPECS: Mapping[tuple[str, ...], type[Spec]] = {
    (): MergeRecipe,
    ("models",): SourceSpec,
    ("precision",): PrecisionSpec,
    ("output",): OutputSpec,
}
"""The spec at each place of a recipe, by the names on the way to it."""
