"""From a model section of a recipe to a model in memory, ready to be trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergekit_bayes.checkpoint.files import shown
from mergekit_bayes.checkpoint.index import Checkpoint
from mergekit_bayes.errors import ModelError
from mergekit_bayes.model.base import BaseIdentity, check_finite, open_base, stored_dtype
from mergekit_bayes.model.head import check_labels, find_fresh, head_modules, label_options, starting_values
from mergekit_bayes.model.library import FAILURES, failure, quiet, seeded
from mergekit_bayes.model.lora import ADAPTER_NAME, add_lora
from mergekit_bayes.model.names import names_on_disk
from mergekit_bayes.model.quantisation import keep_codes, quantisation_options
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
    loading = _Loading(spec, checkpoint, tuple(labels or ()), torch.device(device), tokenizer.pad_token_id)
    quantised = spec.load_in_4bit or spec.load_in_8bit
    with quiet(), seeded(seed):
        model, report = loading.pretrained(adapter, training_dtype)
    where = f"model {shown(spec.path)}"
    fresh = find_fresh(model, report, where=where, stored=tuple(checkpoint.tensors))
    loading.check_head(model, fresh, where)
    starts = starting_values(model, fresh, seed=seed)
    _fill(model, starts)
    check_finite(model, checkpoint, quantised=quantised)
    model.name_or_path = base.path
    keep_codes(model)
    limits = {"longest_row": longest_row(model), "vocabulary": model.get_input_embeddings().weight.shape[0]}
    if adapter is None:
        on_disk = names_on_disk(model)
        starts = {on_disk[name]: value for name, value in starts.items()}
        return LoadedModel(model, tokenizer, replace(base, fresh=starts), **limits)
    whole = (*head_modules(model), *fresh) if spec.task == "sequence_classification" else ()
    adapted = add_lora(model, adapter, task=spec.task, whole=tuple(dict.fromkeys(whole)), seed=seed)
    _fill(adapted, {_trained_name(name, fresh): value for name, value in starts.items()})
    config = adapted.peft_config[ADAPTER_NAME]
    config.base_model_name_or_path, config.revision = base.path, base.revision
    return LoadedModel(adapted, tokenizer, replace(base, fresh=starts), **limits)


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


@dataclass(frozen=True)
class _Loading:
    """Everything `from_pretrained` is told."""

    spec: ModelSpec
    checkpoint: Checkpoint
    labels: tuple[str, ...]
    device: torch.device
    pad_token_id: int

    def pretrained(
        self, adapter: AdapterSpec | None, training_dtype: torch.dtype | None
    ) -> tuple[Any, Mapping[str, Any]]:
        """The model and the report on how the checkpoint filled it."""
        import transformers

        what = f"model {shown(self.spec.path)}: transformers cannot load it"
        if "/" in (self.spec.attn_implementation or ""):
            raise ModelError(
                f"model.attn_implementation: {shown(str(self.spec.attn_implementation))} is code from the hub, which "
                "this library never runs; expected eager, sdpa, flash_attention_2 or another that is installed"
            )
        classes = {
            "causal_lm": transformers.AutoModelForCausalLM,
            "sequence_classification": transformers.AutoModelForSequenceClassification,
        }
        model_class, options = classes[self.spec.task], self._options(adapter)
        try:
            config = self._configuration(transformers)
            if self.spec.load_in_4bit or self.spec.load_in_8bit:
                whole = (adapter.modules_to_save or ()) if adapter is not None else ()
                compute = training_dtype or options["dtype"]
                options["quantization_config"] = quantisation_options(
                    self.spec, model_class, config, compute=compute, whole=whole
                )
            model, report = model_class.from_pretrained(self.checkpoint.folder, config=config, **options)
        except FAILURES as error:
            raise failure(what, error) from error
        return model, report

    def check_head(self, model: Any, fresh: Sequence[str], where: str) -> None:
        """Refuses a head from the checkpoint whose labels are not those of the data."""
        if self.labels and not set(head_modules(model)) & set(fresh):
            stored = self.checkpoint.config.get("id2label")
            names = {int(index): str(name) for index, name in stored.items()} if isinstance(stored, dict) else None
            check_labels(names, self.labels, where)

    def _configuration(self, transformers: Any) -> Any:
        options = label_options(self.labels) if self.labels else {}
        config = transformers.AutoConfig.from_pretrained(
            self.checkpoint.folder, trust_remote_code=False, local_files_only=True, **options
        )
        text = config.get_text_config()
        if self.labels and getattr(text, "pad_token_id", None) is None:
            text.pad_token_id = self.pad_token_id  # how a decoder finds the last token of each text
        return config

    def _options(self, adapter: AdapterSpec | None) -> dict[str, Any]:
        spec, quantised = self.spec, self.spec.load_in_4bit or self.spec.load_in_8bit
        stored = torch.float32 if adapter is None else stored_dtype(self.checkpoint)
        if quantised and stored == torch.float16:
            stored = torch.float32
        return {
            "dtype": stored if spec.dtype is None else getattr(torch, spec.dtype),
            "attn_implementation": spec.attn_implementation,
            "device_map": {"": self.device} if quantised or self.device.type != "cpu" else None,
            "use_safetensors": True,
            "trust_remote_code": False,
            "local_files_only": True,
            "output_loading_info": True,
            "ignore_mismatched_sizes": True,  # reported instead, with both shapes
        }


def _fill(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def _trained_name(name: str, modules: Sequence[str]) -> str:
    """Name in the PEFT model of a parameter of a module that is trained whole."""
    module = next(each for each in modules if name.startswith(f"{each}."))
    return f"base_model.model.{module}.modules_to_save.{ADAPTER_NAME}.{name.removeprefix(f'{module}.')}"
