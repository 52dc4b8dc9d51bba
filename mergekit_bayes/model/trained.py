"""A trained model or adapter as it lies on disk, and in memory as it is: nothing is added, nothing starts anew.

open_trained    headers and configuration
load_trained    the model with its weights in place, and the name on disk of every parameter
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergekit_bayes.checkpoint.adapter import Adapter, is_adapter, open_adapter
from mergekit_bayes.checkpoint.files import listed, shown
from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.header import TensorInfo, read_header
from mergekit_bayes.checkpoint.index import Checkpoint
from mergekit_bayes.checkpoint.orientation import orient
from mergekit_bayes.checkpoint.provenance import read_provenance
from mergekit_bayes.checkpoint.reference import parse_reference, resolve
from mergekit_bayes.checkpoint.sidecar_metadata import METADATA_KEY
from mergekit_bayes.errors import CheckpointError, MissingTensorError, ModelError
from mergekit_bayes.model.base_identity import BaseIdentity, open_base, stored_dtype
from mergekit_bayes.model.library import FAILURES, failure, hush_bitsandbytes
from mergekit_bayes.model.load import LoadedModel, longest_row
from mergekit_bayes.model.lora import ADAPTER_NAME
from mergekit_bayes.model.names import adapter_tensors, names_on_disk, saved_parameters
from mergekit_bayes.model.pretrained import Loading, load_pretrained
from mergekit_bayes.model.tokens import load_tokenizer
from mergekit_bayes.recipe.adapter import AdapterSpec

if TYPE_CHECKING:
    from mergekit_bayes.recipe.model import ModelSpec

__all__ = ["Trained", "load_trained", "open_trained", "parameter_names"]


@dataclass(frozen=True)
class Trained:
    """A trained model or adapter, known by its headers.

    Attributes:
        label: what messages call it: the adapter if there is one, else the model.
        checkpoint: the model, or the base of the adapter.
        identity: of that checkpoint.
        adapter: the adapter, oriented by its base; None for a model on its own.
        folder: where what was trained lies.
        local: whether the user owns that folder: it is not in the hub's cache.
        tensors: what was trained, by name on disk.
        labels: of its classification head, in order, where the files tell; None for others.
    """

    label: str
    checkpoint: Checkpoint
    identity: BaseIdentity
    adapter: Adapter | None
    folder: Path
    local: bool
    tensors: Mapping[str, TensorInfo]
    labels: tuple[str, ...] | None

    @property
    def fingerprint(self) -> str:
        """Fingerprint of `tensors`."""
        return fingerprint(self.tensors)

    @property
    def base(self) -> tuple[str | None, str | None]:
        """Name and fingerprint of the base; of a full model, what its files tell about it."""
        if self.adapter is not None:
            return self.identity.path, self.identity.fingerprint
        about = _about(self.checkpoint)
        name = about.get("base_model")
        known = read_provenance(read_header(self.checkpoint.files[0]).metadata)
        return (name if isinstance(name, str) else None), known.base_fingerprint


def open_trained(model: str, adapter: str | None, *, recipe_dir: Path | None = None) -> Trained:
    """Finds a model, and an adapter on it if there is one, and reads their headers.

    Args:
        model: a folder or hub id of the model, or of the adapter's base.
        adapter: a folder or hub id, with `@revision` as wanted.
        recipe_dir: where relative paths may start beside the current directory.

    Raises:
        CheckpointError: something is not there, cannot be trusted, or the adapter belongs to another base.
        ModelError: the model is an adapter, or the adapter is none.
    """
    here = Path() if recipe_dir is None else recipe_dir
    _refuse_adapter(model, here)
    checkpoint, identity = open_base(model, recipe_dir=recipe_dir)
    if adapter is None:
        local = checkpoint.revision is None
        labels = _labels(checkpoint.config)
        return Trained(model, checkpoint, identity, None, checkpoint.folder, local, checkpoint.tensors, labels)
    parsed = parse_reference(adapter, base_dir=here)
    found = resolve(parsed.model, parsed.revision, base_dir=here)
    if parsed.adapter is not None or not is_adapter(found.path):
        raise ModelError(f"adapter {shown(adapter)}: is no PEFT adapter; expected a folder with adapter_config.json")
    opened = orient(open_adapter(found.path, reference=adapter, revision=found.revision), checkpoint.tensors)
    told = read_provenance(opened.metadata)
    if told.base_fingerprint not in (None, identity.fingerprint):
        raise CheckpointError(
            f"adapter {shown(adapter)}: belongs to a base with fingerprint {told.base_fingerprint}; expected "
            f"{identity.fingerprint}, that of {model}"
        )
    labels = told.labels or _labels(checkpoint.config)
    return Trained(adapter, checkpoint, identity, opened, found.path, found.revision is None, opened.tensors, labels)


def load_trained(
    trained: Trained, spec: ModelSpec, *, labels: Sequence[str] | None, device: torch.device | str
) -> LoadedModel:
    """Puts a trained model into memory.

    Weights are read as `spec.dtype`, else as they are stored, but float32 for float16, whose gradients overflow; an
    adapter's are float32 whatever the base is. What was trained requires gradients, and nothing else.

    Args:
        trained: what to load.
        spec: for which task, and how the base is read.
        labels: of a classification, in the order of the head's outputs.
        device: where it goes.

    Returns:
        The model in evaluation mode, without a cache of keys and values.

    Raises:
        MissingTensorError: something the task needs is in neither file and would start at random.
        ModelError: it cannot be loaded.
    """
    reference = spec.path
    tokenizer = load_tokenizer(trained.checkpoint.folder, reference=reference)
    known = tuple(labels or ()) if spec.task == "sequence_classification" else ()
    stored = stored_dtype(trained.checkpoint)
    dtype = spec.dtype or str(torch.float32 if stored == torch.float16 else stored).removeprefix("torch.")
    whole = trained.adapter.config.get("modules_to_save") if trained.adapter is not None else None
    kept = AdapterSpec.model_validate({"modules_to_save": whole}) if whole else None
    loading = Loading(
        spec.model_copy(update={"dtype": dtype}),
        kept,
        trained.checkpoint,
        known,
        torch.device(device),
        tokenizer.pad_token_id,
    )
    model, fresh = load_pretrained(loading)
    _refuse_fresh(trained, fresh)
    longest, vocabulary = longest_row(model), int(model.get_input_embeddings().weight.shape[0])
    if trained.adapter is not None:
        model = _with_adapter(model, trained, trained.adapter)
    model.eval()
    if getattr(model.config, "use_cache", None) is not None:
        model.config.use_cache = False
    return LoadedModel(model, tokenizer, trained.identity, longest, vocabulary)


def parameter_names(model: Any, trained: Trained) -> dict[str, str]:
    """Returns the name on disk of every parameter that was trained, by its (first) name in memory.

    Raises:
        MissingTensorError: parameters that the files hold in another layout than memory.
    """
    on_disk = _names_in_files(model, trained)
    found = {name: on_disk.get(name) for name, p in model.named_parameters() if p.requires_grad}
    named = {name: _stored(disk, trained.tensors) for name, disk in found.items()}
    lost = sorted(name for name, disk in named.items() if disk is None)
    if lost:
        raise MissingTensorError(
            f"{shown(trained.label)}: {listed(lost, 5)} are stored as other tensors than they are in memory, and a "
            "sidecar describes what is stored; expected a model saved with save_original_format=False"
        )
    return {name: disk for name, disk in named.items() if disk is not None}


def _names_in_files(model: Any, trained: Trained) -> dict[str, str]:
    if trained.adapter is None:
        return names_on_disk(model)
    by_identity = {id(parameter): name for name, parameter in saved_parameters(model).items()}
    return {name: by_identity[id(p)] for name, p in model.named_parameters() if id(p) in by_identity}


def _stored(name: str | None, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The name in the file; a published checkpoint may lack the outermost prefix."""
    if name is None or name in tensors:
        return name
    short = name.partition(".")[2]
    return short if short in tensors else None


def _refuse_adapter(model: str, here: Path) -> None:
    parsed = parse_reference(model, base_dir=here)
    folder = resolve(parsed.model, parsed.revision, base_dir=here).path if parsed.adapter is None else None
    if folder is None or is_adapter(folder):
        raise ModelError(
            f"model {shown(model)}: is or has a PEFT adapter; expected the base as `model` and the adapter as `adapter`"
        )


def _refuse_fresh(trained: Trained, fresh: Sequence[str]) -> None:
    saved = trained.adapter.saved if trained.adapter is not None else {}
    random = [module for module in fresh if not any(name.startswith(f"{module}.") for name in saved)]
    if random:
        raise MissingTensorError(
            f"{shown(trained.label)}: holds no {listed(random)}, which the task needs and which would start at random; "
            "expected a model that was trained for this task"
        )


def _with_adapter(model: Any, trained: Trained, adapter: Adapter) -> Any:
    hush_bitsandbytes()
    import peft

    with warnings.catch_warnings():
        # what PEFT warns about is compared below, by name
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        try:
            adapted = peft.PeftModel.from_pretrained(
                model, str(adapter.folder), adapter_name=ADAPTER_NAME, is_trainable=True
            )
        except FAILURES as error:
            raise failure(f"adapter {shown(trained.label)}: PEFT cannot load it", error) from error
    missing = sorted(adapter_tensors(adapted).keys() ^ adapter.tensors.keys())
    if missing:
        raise MissingTensorError(
            f"adapter {shown(trained.label)}: {listed(missing, 5)} are in the file or in memory but not in both; "
            "expected an adapter of this base"
        )
    return adapted


def _labels(config: Mapping[str, object]) -> tuple[str, ...] | None:
    """Names of the classes by a configuration; None where it has only numbers for them."""
    stored = config.get("id2label")
    if not isinstance(stored, dict) or not all(str(key).isdigit() for key in stored):
        return None
    names = tuple(str(stored[key]) for key in sorted(stored, key=int))
    return None if all(name == f"LABEL_{index}" for index, name in enumerate(names)) else names


def _about(checkpoint: Checkpoint) -> Mapping[str, Any]:
    try:
        content = json.loads(read_header(checkpoint.files[0]).metadata.get(METADATA_KEY, "{}"))
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
