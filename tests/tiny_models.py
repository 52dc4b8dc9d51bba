"""Tiny real models: transformers architectures with a few thousand weights, saved the way people save theirs.

Every weight comes from NumPy's PCG64 stream for (seed, tensor name), scaled by a power of two: the bits do
not depend on the machine, so outputs of other programs on these models can be committed and compared with.
A checkpoint with `drift > 0` is the checkpoint of seed 0 moved a little, as fine-tuning moves a base.

Needs numpy, torch, transformers (and peft for adapters) only: scripts for other merging tools use it too.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

VOCABULARY = 48
_TEXT = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_DECODER = {**_TEXT, "num_key_value_heads": 1, "intermediate_size": 24, "max_position_embeddings": 32}
_ENCODER = {**_TEXT, "intermediate_size": 24, "max_position_embeddings": 32}
_VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 3,
}
_UNTIED = {"tie_word_embeddings": False}
_TIED = {"tie_word_embeddings": True}
_EXPERTS = {**_DECODER, **_UNTIED, "num_local_experts": 2, "num_experts_per_tok": 1}


@dataclass(frozen=True)
class TinyModel:
    """A model class of transformers, the class of its config, and small sizes for it.

    `original_format` saves the tensor names found on the hub; without it, the names inside transformers 5,
    which differ for some architectures (experts are fused, for example).
    """

    model: str
    config: str
    sizes: Mapping[str, Any] = field(default_factory=dict)
    original_format: bool = True


TINY_MODELS: Mapping[str, TinyModel] = {
    "llama": TinyModel("LlamaForCausalLM", "LlamaConfig", {**_DECODER, **_UNTIED}),
    "llama_deep": TinyModel(
        "LlamaForCausalLM", "LlamaConfig", {**_DECODER, **_UNTIED, "num_hidden_layers": 5, "vocab_size": 24}
    ),
    "llama_tied": TinyModel("LlamaForCausalLM", "LlamaConfig", {**_DECODER, **_TIED}),
    "llama_bias": TinyModel("LlamaForCausalLM", "LlamaConfig", {**_DECODER, **_UNTIED, "attention_bias": True}),
    "qwen2": TinyModel("Qwen2ForCausalLM", "Qwen2Config", {**_DECODER, **_UNTIED}),
    "qwen2_tied": TinyModel("Qwen2ForCausalLM", "Qwen2Config", {**_DECODER, **_TIED}),
    "mistral": TinyModel("MistralForCausalLM", "MistralConfig", {**_DECODER, **_UNTIED}),
    "gemma2": TinyModel("Gemma2ForCausalLM", "Gemma2Config", {**_DECODER, **_TIED, "head_dim": 8}),
    "gpt2": TinyModel(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 32,
            "bos_token_id": 0,
            "eos_token_id": 0,
            **_TIED,
        },
    ),
    "bert": TinyModel("BertForSequenceClassification", "BertConfig", {**_ENCODER, "num_labels": 3}),
    "bert_masked_lm": TinyModel("BertForMaskedLM", "BertConfig", _ENCODER),
    "vit": TinyModel("ViTForImageClassification", "ViTConfig", _VISION),
    "vit_renamed": TinyModel("ViTForImageClassification", "ViTConfig", _VISION, original_format=False),
    "mixtral": TinyModel("MixtralForCausalLM", "MixtralConfig", _EXPERTS),
    "mixtral_fused": TinyModel("MixtralForCausalLM", "MixtralConfig", _EXPERTS, original_format=False),
}


def tiny_model(name: str, *, seed: int = 0, drift: float = 0.0, dtype: torch.dtype = torch.float32) -> Any:
    """Build one of `TINY_MODELS` in evaluation mode.

    Args:
        name: key of `TINY_MODELS`.
        seed: which weights; without drift, each seed is an unrelated model.
        drift: with a value > 0, the model of seed 0 plus uniform noise of this half-width drawn for `seed`.
        dtype: dtype of every floating tensor.

    Returns:
        The transformers model.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    entry = TINY_MODELS[name]
    model = getattr(transformers, entry.model)(getattr(transformers, entry.config)(**entry.sizes))
    with torch.no_grad():
        for tensor_name, parameter in model.named_parameters():
            values = uniform(tensor_name, tuple(parameter.shape), seed=0 if drift else seed, half_width=0.25)
            if drift:
                values = values + uniform(tensor_name, tuple(parameter.shape), seed=seed, half_width=drift)
            parameter.copy_(values)
    return model.to(dtype).eval()


def save_tiny_model(
    name: str,
    folder: Path,
    *,
    seed: int = 0,
    drift: float = 0.0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
) -> Path:
    """Write `tiny_model` with `save_pretrained`; `max_shard_size="8KB"` gives several shards.

    Returns:
        The folder.
    """
    model = tiny_model(name, seed=seed, drift=drift, dtype=dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=TINY_MODELS[name].original_format)
    return folder


def save_tiny_adapter(base: Path, folder: Path, *, seed: int, **lora: Any) -> Path:
    """Write a LoRA adapter of the checkpoint in `base` with PEFT; both factors are non-zero.

    Args:
        base: folder of a checkpoint; it becomes the adapter's `base_model_name_or_path`.
        folder: where to write.
        seed: which weights.
        lora: arguments of `peft.LoraConfig`; rank 4 on `q_proj` and `v_proj` unless given.

    Returns:
        The folder.
    """
    import peft
    import transformers

    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **lora})
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for tensor_name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(uniform(tensor_name, tuple(parameter.shape), seed=seed, half_width=0.125))
    adapted.save_pretrained(folder)
    return folder


def uniform(name: str, shape: tuple[int, ...], *, seed: int, half_width: float) -> torch.Tensor:
    """Uniform float32 values in [-half_width, half_width), the same bits on every machine.

    Args:
        name: names the stream, so that a tensor's values do not depend on which others exist.
        shape: shape of the result.
        seed: names the stream too.
        half_width: a power of two keeps the scaling exact.
    """
    stream = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())]))
    values = stream.random(shape, dtype=np.float32) * np.float32(2) - np.float32(1)
    return torch.from_numpy(values * np.float32(half_width))
