"""Parameters in memory and their names on disk.

In memory an adapter's factors carry the adapter's name and trained modules lie in wrappers; and transformers renames
the tensors of some architectures as it loads them. On disk they have the names that PEFT, `from_pretrained` and merges
know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mergekit_bayes.model.lora import ADAPTER_NAME


def saved_parameters(model: nn.Module, *, frozen: bool = False) -> dict[str, nn.Parameter]:
    """Returns parameters by their name in the saved adapter or checkpoint.

    Args:
        model: a PEFT model, whose adapter is what gets saved, or any other model; also inside the wrappers of
            distributed training and torch.compile.
        frozen: include those that are not trained, as all are in a model that was loaded for prediction.

    Returns:
        Sorted by name. Tied weights are there once. The parameters are the model's own.
    """
    inner = unwrapped(model)
    found = _adapter_tensors(inner) if hasattr(inner, "peft_config") else checkpoint_tensors(inner)
    return {
        name: tensor
        for name, tensor in sorted(found.items())
        if isinstance(tensor, nn.Parameter) and (frozen or tensor.requires_grad)
    }


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Everything an adapter file holds, by name: factors, and modules that were trained whole."""
    return dict(sorted(_adapter_tensors(unwrapped(model)).items()))


def checkpoint_tensors(model: Any) -> dict[str, Tensor]:
    """Everything a checkpoint of a model holds, by name: parameters and persistent buffers, tied ones once.

    An architecture that transformers stores in another layout than it computes in (experts, fused in memory) keeps
    the layout of memory, so that every tensor on disk is one in memory; `from_pretrained` reads both.
    """
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    kept: dict[int, str] = {}
    for name, tensor in state.items():
        if name not in ignored and not (name in tied and state.get(tied[name]) is tensor):
            kept.setdefault(id(tensor), name)
    tensors = {name: state[name] for name in kept.values()}
    renamed = _in_original_format(model, tensors)
    in_memory = {id(tensor) for tensor in tensors.values()}
    return renamed if {id(tensor) for tensor in renamed.values()} == in_memory else tensors


def names_on_disk(model: Any) -> dict[str, str]:
    """The name in a checkpoint of every tensor in memory that one holds."""
    by_identity = {id(tensor): name for name, tensor in checkpoint_tensors(model).items()}
    state = model.state_dict(keep_vars=True)
    return {name: by_identity[id(tensor)] for name, tensor in state.items() if id(tensor) in by_identity}


def unwrapped(model: nn.Module) -> Any:
    """The model inside the wrappers of DistributedDataParallel and torch.compile."""
    inner: Any = model
    while True:
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        else:
            return inner


def _in_original_format(model: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not hasattr(model, "config"):
        return dict(tensors)
    from transformers.core_model_loading import revert_weight_conversion

    reverted: dict[str, Tensor] = revert_weight_conversion(model, dict(tensors))
    return reverted


def _adapter_tensors(model: Any) -> dict[str, Tensor]:
    import peft

    active = model.active_adapter if isinstance(model.active_adapter, str) else ADAPTER_NAME
    # not `state_dict`, which would pack the codes of every quantised weight
    state: dict[str, Tensor] = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    # without the embedding that PEFT copies beside factors of it: the vocabulary is never resized here
    found: dict[str, Tensor] = peft.get_peft_model_state_dict(
        model, state_dict=state, adapter_name=active, save_embedding_layers=False
    )
    return found
