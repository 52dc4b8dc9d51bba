"""The section `model`: the pretrained model that is trained, and how it is loaded.

model: org/base@revision
model: {path: org/base, load_in_4bit: true, dtype: bfloat16}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from mergekit_bayes.recipe import field
from mergekit_bayes.recipe.mergekit_words import DTYPES as SHORT_DTYPES
from mergekit_bayes.recipe.problem import refusal, show
from mergekit_bayes.recipe.spec import Spec, checked

TrainingDType: TypeAlias = Literal["bfloat16", "float16", "float32"]

_choose_dtype = field.choice("bfloat16", "float16", "float32", also=SHORT_DTYPES)


def _dtype(value: object) -> str | None:
    if value == "auto":
        raise refusal("found `auto`; leave the key out: the model is then read as it is stored.")
    return None if value is None else _choose_dtype(value)


_task = field.choice(
    "causal_lm",
    "sequence_classification",
    also={
        "seq_cls": "sequence_classification",
        "text-classification": "sequence_classification",
        "text_classification": "sequence_classification",
        "classification": "sequence_classification",
        "text-generation": "causal_lm",
        "text_generation": "causal_lm",
        "sft": "causal_lm",
        "lm": "causal_lm",
    },
)


class ModelSpec(Spec):
    """The pretrained model.

    Attributes:
        path: a local folder or hub id, with `@revision` as wanted.
        task: `causal_lm` (next tokens) or `sequence_classification` (one label per text).
        dtype: what the weights are read as; None for as stored beside an adapter, float32 where they are trained.
        load_in_4bit: quantise the frozen weights to 4 bits (bitsandbytes); needs an adapter.
        load_in_8bit: quantise them to 8 bits.
        bnb_4bit_quant_type: the 4-bit number format.
        bnb_4bit_use_double_quant: quantise the scales of the 4-bit blocks too.
        bnb_4bit_compute_dtype: what 4-bit weights are multiplied as; None for the training's precision.
        attn_implementation: as in transformers (`eager`, `sdpa`, `flash_attention_2`, ...); None for its choice.
    """

    path: Annotated[str, checked(field.text)]
    task: Annotated[Literal["causal_lm", "sequence_classification"], checked(_task)] = "causal_lm"
    dtype: Annotated[TrainingDType | None, checked(_dtype)] = None
    load_in_4bit: Annotated[bool, checked(field.boolean)] = False
    load_in_8bit: Annotated[bool, checked(field.boolean)] = False
    bnb_4bit_quant_type: Annotated[Literal["nf4", "fp4"], checked(field.choice("nf4", "fp4"))] = "nf4"
    bnb_4bit_use_double_quant: Annotated[bool, checked(field.boolean)] = False
    bnb_4bit_compute_dtype: Annotated[TrainingDType | None, checked(_dtype)] = None
    attn_implementation: Annotated[str | None, checked(field.optional(field.text))] = None

    def without_effect(self) -> frozenset[str]:
        """Options of 4-bit weights mean nothing for others."""
        options = {name for name in type(self).model_fields if name.startswith("bnb_4bit_")}
        return frozenset() if self.load_in_4bit else frozenset(options)


def model_mapping(value: object) -> object:
    """The section written out, also where it is only a path."""
    if value is None:
        return {}
    if isinstance(value, ModelSpec | Mapping):
        return value
    if isinstance(value, list | tuple | bool | int | float):
        raise refusal(f"expected a folder, a hub id or a mapping with `path`, found {show(value)}.")
    return {"path": value}
