"""From a model section of a recipe to a model in memory, ready to be trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergekit_bayes.errors import ModelError
from mergekit_bayes.model.base_identity import BaseIdentity, open_base
from mergekit_bayes.model.head import head_modules, starting_values
from mergekit_bayes.model.library import FAILURES, failure
from mergekit_bayes.model.lora import ADAPTER_NAME, add_lora
from mergekit_bayes.model.names import names_on_disk
from mergekit_bayes.model.pretrained import Loading, load_pretrained
from mergekit_bayes.model.tokens import load_tokenizer

if TYPE_CHECKING:
    from mergekit_bayes.recipe.adapter import AdapterSpec
    from mergekit_bayes.recipe.model import ModelSpec

_POSITIONS = ("position_embeddings", "position_embedding", "embed_positions", "wpe")


@dataclass(frozen=True)
class LoadedModel:
    """A model with what it takes to train it and to say later what it was trained from.

    Attributes:
        model: a PEFT model if there is an adapter, else a transformers model; in evaluation mode.
        tokenizer: of the base; it has a padding token.
        base: identity of the base, and starting values of what the base has not.
        longest_row: tokens that its learned position embeddings can hold; None if it has none of these.
        vocabulary: rows of its embedding; a tokenizer may know more tokens than that.
    """

    model: Any
    tokenizer: Any
    base: BaseIdentity
    longest_row: int | None
    vocabulary: int


def load_for_training(
    spec: ModelSpec,
    adapter: AdapterSpec | None,
    *,
    labels: Sequence[str] | None,
    seed: int,
    device: torch.device | str,
    recipe_dir: Path | None = None,
    training_dtype: torch.dtype | None = None,
) -> LoadedModel:
    """Loads a pretrained model and adds what is to be trained.

    With an adapter the base is frozen and read as `spec.dtype`, else as it is stored; factors, and modules that are
    trained whole, are float32 whatever the base is. Without one all weights are trained, as `spec.dtype`, else
    float32. Quantised, the weights that stay numbers are `spec.dtype`, else as stored, but float32 for float16,
    which overflows in training.

    Args:
        spec: which model, for which task.
        adapter: the factors; None trains all weights.
        labels: of a classification, in the order of the head's outputs.
        seed: of factors and head; nothing else that was or will be drawn matters, or is disturbed.
        device: where the model goes.
        recipe_dir: folder of the recipe, from which relative paths are tried after the current directory.
        training_dtype: what training computes in (bf16, fp16), which 4-bit weights are multiplied as.

    Raises:
        CheckpointError: the base is not there or not to be trusted, or does not fit the task.
        NonFiniteError: it holds NaN or infinity.
        ModelError: an option, or a name of the adapter, does not fit the base; bitsandbytes is missing.
    """
    if spec.task == "sequence_classification" and not labels:
        raise ModelError("model.task: sequence_classification needs the labels of the data, found none")
    checkpoint, base = open_base(spec.path, recipe_dir=recipe_dir)
    tokenizer = load_tokenizer(checkpoint.folder, reference=spec.path)
    known = tuple(labels or ()) if spec.task == "sequence_classification" else ()
    pad = tokenizer.pad_token_id
    model, fresh = load_pretrained(Loading(spec, adapter, checkpoint, known, torch.device(device), pad, training_dtype))
    model.name_or_path = base.path
    starts = starting_values(model, fresh, seed=seed)
    longest, vocabulary = longest_row(model), int(model.get_input_embeddings().weight.shape[0])
    if adapter is None:
        _fill(model, starts)
        on_disk = names_on_disk(model)
        starts = {on_disk[name]: value for name, value in starts.items()}
    else:
        whole = tuple(dict.fromkeys([*head_modules(model), *fresh])) if known else ()
        model = add_lora(model, adapter, task=spec.task, whole=whole, seed=seed)
        _fill(model, {_trained_name(name, fresh): value for name, value in starts.items()})
        config = model.peft_config[ADAPTER_NAME]
        config.base_model_name_or_path, config.revision = base.path, base.revision
    return LoadedModel(model, tokenizer, replace(base, fresh=starts), longest, vocabulary)


def longest_row(model: nn.Module) -> int | None:
    """The number of tokens that learned, absolute position embeddings can hold; None for rotary and relative ones."""
    found = [
        module.num_embeddings - getattr(module, "offset", 0 if module.padding_idx is None else module.padding_idx + 1)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS
    ]
    return min(found, default=None)


def checkpoint_gradients(model: Any) -> None:
    """Recomputes activations in the backward pass instead of keeping them.

    Args:
        model: as loaded; with an adapter, its inputs are made to require gradients, so that they reach the factors.

    Raises:
        ModelError: the architecture cannot do it.
    """
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    try:
        if hasattr(inner, "activation_checkpointing_enable"):  # the newer name
            inner.activation_checkpointing_enable({"use_reentrant": False})
        else:
            inner.gradient_checkpointing_enable({"use_reentrant": False})
    except FAILURES as error:
        raise failure("training.gradient_checkpointing", error) from error
    if inner is not model:
        inner.enable_input_require_grads()


def _fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def _trained_name(name: str, modules: Sequence[str]) -> str:
    """Name in the PEFT model of a parameter of a module that is trained whole."""
    module = next(each for each in modules if name.startswith(f"{each}."))
    return f"base_model.model.{module}.modules_to_save.{ADAPTER_NAME}.{name.removeprefix(f'{module}.')}"
