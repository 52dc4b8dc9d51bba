"""Frozen weights as 4-bit or 8-bit codes, through bitsandbytes.

Only linear layers are coded. Output heads, and modules that are trained whole, stay numbers: codes cannot be trained.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mergekit_bayes.errors import ModelError
from mergekit_bayes.model.head import head_modules, pooler_module
from mergekit_bayes.model.library import hush_bitsandbytes

if TYPE_CHECKING:
    from mergekit_bayes.recipe.model import ModelSpec


def check_bitsandbytes() -> None:
    """Refuses quantised weights where bitsandbytes is not installed.

    Raises:
        ModelError: it is not.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "model: load_in_4bit and load_in_8bit need bitsandbytes, which is not installed; "
            "pip install 'mergekit-bayes[quantize]', or leave the weights as they are"
        )


def quantisation_options(
    spec: ModelSpec, model_class: Any, config: Any, *, compute: torch.dtype, whole: Sequence[str]
) -> Any:
    """Returns the `BitsAndBytesConfig` of a model section.

    Args:
        spec: asks for 4-bit or 8-bit weights.
        model_class: the Auto class that will load the model.
        config: its configuration.
        compute: what 4-bit weights are multiplied as, where the recipe does not say.
        whole: names of modules that are trained whole.

    Raises:
        ModelError: bitsandbytes is not installed.
    """
    check_bitsandbytes()
    hush_bitsandbytes()
    import transformers

    named = spec.bnb_4bit_compute_dtype
    skipped = _kept(model_class, config, whole)
    if spec.load_in_8bit:
        return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=spec.bnb_4bit_use_double_quant,
        bnb_4bit_compute_dtype=compute if named is None else getattr(torch, named),
        llm_int8_skip_modules=skipped,
    )


def _kept(model_class: Any, config: Any, whole: Sequence[str]) -> list[str] | None:
    """Modules that stay numbers; None for what transformers keeps by itself, a language model's output head."""
    with torch.device("meta"):
        model = model_class.from_config(config)
    heads = head_modules(model) if model.get_output_embeddings() is None else ()
    kept = {*heads, *whole, *_output_names(model)}
    if pooler := pooler_module(model):
        kept.add(pooler)
    return sorted(kept)


def _output_names(model: Any) -> list[str]:
    """A language model's head, and the embedding it may be tied to."""
    parts = [model.get_output_embeddings(), model.get_input_embeddings()]
    return [name for name, module in model.named_modules() if any(module is part for part in parts)]


def keep_codes(model: nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights at the first evaluation on a CPU with bfloat16 instructions.

    What it repacks are other weights than before, their scales rounded to bfloat16, for good: a training that is
    evaluated would differ from one that is not. It also wants a kernel of its own from the hub for them, and layers
    whose outputs are a multiple of 32.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
