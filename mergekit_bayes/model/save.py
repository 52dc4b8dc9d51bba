"""What training leaves behind: an adapter or a full model that PEFT, transformers and merges take as it stands.

Equal weights give equal bytes, files have the mode that the umask gives, and a full disk is met before the first byte.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_bayes.checkpoint.disk import disk_errors, write_atomically
from mergekit_bayes.checkpoint.dtypes import dtype_of
from mergekit_bayes.checkpoint.files import shown
from mergekit_bayes.checkpoint.initial import FRESH_NAME
from mergekit_bayes.checkpoint.sidecar_metadata import METADATA_KEY
from mergekit_bayes.checkpoint.writer import ShardWriter, TensorEntry, index_json, index_name, layout_shards
from mergekit_bayes.errors import OutputError
from mergekit_bayes.model.base_identity import BaseIdentity
from mergekit_bayes.model.lora import ADAPTER_NAME
from mergekit_bayes.model.names import adapter_tensors, checkpoint_tensors, unwrapped

_MAX_SHARD_BYTES = 5 * 10**9


def save_trained(
    model: Any,
    tokenizer: Any,
    folder: Path,
    *,
    base: BaseIdentity,
    write: bool = True,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
) -> None:
    """Writes a trained adapter or model with its tokenizer.

    Args:
        model: as trained, in any wrapper. Where its weights are spread over processes, all of them call this.
        tokenizer: goes with it; None for none.
        folder: empty or new.
        base: what it was trained from; its fingerprint goes into the files, so that merges refuse another base.
        write: whether this process is the one that writes.
        max_shard_bytes: bytes per file of a full model; an adapter is one file.

    Raises:
        OutputError: the disk failed, or is too full.
    """
    inner = unwrapped(model)
    adapted = hasattr(inner, "peft_config")
    if write:
        with disk_errors(folder, "create"):
            folder.mkdir(parents=True, exist_ok=True)
    stem = "adapter_model" if adapted else "model"
    tensors = adapter_tensors(inner) if adapted else checkpoint_tensors(inner)
    about = _provenance(inner, base)
    limit = 1 << 62 if adapted else max_shard_bytes
    _write_tensors(folder, stem, tensors, about=about, write=write, max_shard_bytes=limit)
    if not write:
        return
    if base.fresh:
        _write_tensors(folder, FRESH_NAME.removesuffix(".safetensors"), base.fresh, about=about)
    if adapted:
        write_atomically(folder / "adapter_config.json", _adapter_configuration(inner, base))
    else:
        for name, content in _model_configuration(inner).items():
            write_atomically(folder / name, content)
    if tokenizer is not None:
        _save_tokenizer(tokenizer, folder)


def _write_tensors(
    folder: Path,
    stem: str,
    tensors: Mapping[str, Tensor],
    *,
    about: str,
    write: bool = True,
    max_shard_bytes: int = 1 << 62,
) -> None:
    entries = [TensorEntry(name, dtype_of(tensor), tuple(tensor.shape)) for name, tensor in sorted(tensors.items())]
    metadata = {"format": "pt", METADATA_KEY: about}
    layouts = layout_shards(entries, stem=stem, max_shard_bytes=max_shard_bytes, metadata=metadata)
    for layout in layouts:
        if not write:
            for entry in layout.entries:
                _whole(tensors[entry.name])
            continue
        with ShardWriter(folder / layout.filename, layout) as writer:
            for entry in layout.entries:
                writer.write(entry.name, 0, _whole(tensors[entry.name]))
    if write and len(layouts) > 1:
        write_atomically(folder / index_name(stem), index_json(layouts))


def _whole(tensor: Tensor) -> Tensor:
    """All of a tensor as a flat one on CPU; where processes hold parts of it, each of them has to ask."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.detach().cpu().contiguous().view(-1)


def _provenance(model: Any, base: BaseIdentity) -> str:
    """What a file says about itself in its header; an adapter has no other place for labels and the model's class."""
    content: dict[str, object] = {
        "base_fingerprint": base.fingerprint,
        "base_model": base.path,
        "base_revision": base.revision,
    }
    config: Any = getattr(model, "config", None)
    if getattr(config, "problem_type", None) == "single_label_classification":
        content["architecture"] = _class_name(model.get_base_model() if hasattr(model, "peft_config") else model)
        content["labels"] = [config.id2label[index] for index in sorted(config.id2label)]
        content["pad_token_id"] = config.pad_token_id
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def _class_name(model: Any) -> str:
    return type(model).__name__.removeprefix("FSDP")  # which fully_shard puts before it


def _adapter_configuration(model: Any, base: BaseIdentity) -> bytes:
    """PEFT's own configuration, with sets in an order and only modules that are there."""
    active = model.active_adapter if isinstance(model.active_adapter, str) else ADAPTER_NAME
    content = {
        key: sorted(value) if isinstance(value, set) else value for key, value in _config_of(model, active).items()
    }
    if isinstance(content.get("target_modules"), list):
        content["target_modules"] = sorted(content["target_modules"])
    named = set(content.get("modules_to_save") or ())
    kept = [name for name, module in model.named_modules() if hasattr(module, "modules_to_save")]
    used = sorted(name for name in named if any(f".{owner}".endswith(f".{name}") for owner in kept))
    content.update(
        base_model_name_or_path=base.path, inference_mode=True, modules_to_save=used or None, revision=base.revision
    )
    return _json(content)


def _config_of(model: Any, active: str) -> dict[str, Any]:
    content: dict[str, Any] = model.peft_config[active].to_dict()
    return content


def _model_configuration(model: Any) -> dict[str, bytes]:
    config = copy.deepcopy(model.config)
    config.architectures = [_class_name(model)]
    config.dtype = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")
    files = {"config.json": config.to_json_string(use_diff=True).encode()}
    if model.can_generate() and getattr(model, "generation_config", None) is not None:
        files["generation_config.json"] = model.generation_config.to_json_string(use_diff=True).encode()
    return files


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    with disk_errors(folder, "write the tokenizer"):
        try:
            tokenizer.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:  # the tokenizers library raises the system's errors as plain exceptions
            raise OutputError(f"{shown(folder)}: cannot write the tokenizer: {shown(str(error))}") from error


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


__all__ = ["FRESH_NAME", "save_trained"]
