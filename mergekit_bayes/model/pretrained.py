"""A checkpoint through `from_pretrained`, with everything that transformers would pass over in silence refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mergekit_bayes.checkpoint.files import shown
from mergekit_bayes.checkpoint.index import Checkpoint
from mergekit_bayes.errors import ModelError
from mergekit_bayes.model.base_identity import check_finite, stored_dtype
from mergekit_bayes.model.head import check_labels, find_fresh, head_modules, label_options
from mergekit_bayes.model.library import FAILURES, failure, quiet, seeded
from mergekit_bayes.model.quantisation import keep_codes, quantisation_options

if TYPE_CHECKING:
    from mergekit_bayes.recipe.adapter import AdapterSpec
    from mergekit_bayes.recipe.model import ModelSpec


@dataclass(frozen=True)
class Loading:
    """How a base is to be read.

    Attributes:
        spec: the model section.
        adapter: what will be trained beside it; None where it is trained itself.
        checkpoint: its headers.
        labels: of a classification; empty for a language model.
        device: where it goes.
        pad_token_id: of its tokenizer.
        training_dtype: what training computes in, if that is not the type of the weights.
        device_map: how Accelerate spreads the model over devices; None for `device` alone.
    """

    spec: ModelSpec
    adapter: AdapterSpec | None
    checkpoint: Checkpoint
    labels: tuple[str, ...]
    device: torch.device
    pad_token_id: int
    training_dtype: torch.dtype | None = None
    device_map: str | Mapping[str, str | int] | None = None

    @property
    def quantised(self) -> bool:
        """Whether linear layers become codes."""
        return self.spec.load_in_4bit or self.spec.load_in_8bit

    @property
    def where(self) -> str:
        """The base, as messages begin."""
        return f"model {shown(self.spec.path)}"

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are read as."""
        if self.spec.dtype is not None:
            asked = getattr(torch, self.spec.dtype)
            assert isinstance(asked, torch.dtype)
            return asked
        stored = torch.float32 if self.adapter is None else stored_dtype(self.checkpoint)
        return torch.float32 if self.quantised and stored == torch.float16 else stored


def load_pretrained(loading: Loading) -> tuple[Any, tuple[str, ...]]:
    """Loads a model for a task.

    Returns:
        The model, and the names of modules that the checkpoint lacks and that may be new.

    Raises:
        MissingTensorError: the checkpoint lacks weights, or holds some that the model has no place for.
        ShapeMismatchError: it holds weights of another shape.
        NonFiniteError: it holds NaN or infinity.
        ModelError: transformers cannot load it, or an option does not fit it.
    """
    with quiet(), seeded(0):
        model, report = _from_pretrained(loading)
    fresh = find_fresh(model, report, where=loading.where, stored=tuple(loading.checkpoint.tensors))
    _check_head(loading, model, fresh)
    check_finite(model, loading.checkpoint, quantised=loading.quantised)
    keep_codes(model)
    return model, fresh


def _from_pretrained(loading: Loading) -> tuple[Any, Mapping[str, Any]]:
    import transformers

    spec = loading.spec
    if "/" in (spec.attn_implementation or ""):
        raise ModelError(
            f"model.attn_implementation: {shown(str(spec.attn_implementation))} is code from the hub, which this "
            "library never runs; expected eager, sdpa, flash_attention_2 or another that is installed"
        )
    classes = {
        "causal_lm": transformers.AutoModelForCausalLM,
        "sequence_classification": transformers.AutoModelForSequenceClassification,
    }
    model_class = classes[spec.task]
    try:
        config = _configuration(loading)
        model, report = model_class.from_pretrained(
            loading.checkpoint.folder,
            config=config,
            dtype=loading.dtype,
            attn_implementation=spec.attn_implementation,
            quantization_config=_codes(loading, model_class, config) if loading.quantised else None,
            device_map=_device_map(loading),
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported and refused, with both shapes
        )
    except FAILURES as error:
        raise failure(f"{loading.where}: transformers cannot load it", error) from error
    return model, report


def _device_map(loading: Loading) -> Any:
    if loading.device_map is not None:
        return loading.device_map if isinstance(loading.device_map, str) else dict(loading.device_map)
    return {"": loading.device} if loading.quantised or loading.device.type != "cpu" else None


def _configuration(loading: Loading) -> Any:
    import transformers

    options = label_options(loading.labels) if loading.labels else {}
    config = transformers.AutoConfig.from_pretrained(
        loading.checkpoint.folder, trust_remote_code=False, local_files_only=True, **options
    )
    text = config.get_text_config()
    if loading.labels and getattr(text, "pad_token_id", None) is None:
        text.pad_token_id = loading.pad_token_id  # how a decoder finds the last token of each text
    return config


def _codes(loading: Loading, model_class: Any, config: Any) -> Any:
    whole = (loading.adapter.modules_to_save or ()) if loading.adapter is not None else ()
    compute = loading.training_dtype or loading.dtype
    return quantisation_options(loading.spec, model_class, config, compute=compute, whole=whole)


def _check_head(loading: Loading, model: Any, fresh: Sequence[str]) -> None:
    """Refuses a head from the checkpoint whose labels are not those of the data."""
    if loading.labels and not set(head_modules(model)) & set(fresh):
        stored = loading.checkpoint.config.get("id2label")
        names = {int(index): str(name) for index, name in stored.items()} if isinstance(stored, dict) else None
        check_labels(names, loading.labels, loading.where)
