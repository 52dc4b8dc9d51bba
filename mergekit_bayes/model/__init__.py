"""Hugging Face models as modules in memory: loading, adapting, quantising, and the names their weights have on disk.

    load_for_training     a model section of a recipe -> model, tokenizer and the identity of the base
    checkpoint_gradients  recompute activations instead of keeping them
    saved_parameters      parameters by their names on disk
    save_trained          adapter or full model -> a folder that PEFT, transformers and merges read
    write_precision       the sidecar beside it
    check_launch          do the processes of this run know of each other

The files: base (found, checked), tokens, pretrained, head (of a classification), quantisation, lora, targets and load
make the model; names, save and sidecar write it; trained loads what was trained
as it is; launch; library (transformers without its noise); environment (for reports).
"""

from __future__ import annotations

import importlib.util

from mergekit_bayes.errors import ModelError

_NEEDED = ("transformers", "peft", "accelerate")

if _missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
    raise ModelError(f"models need {', '.join(_missing)}, not installed here; pip install 'mergekit-bayes[train]'")

from mergekit_bayes.model.base_identity import BaseIdentity  # noqa: E402 - after the check, whose message is of more help
from mergekit_bayes.model.launch import check_launch  # noqa: E402
from mergekit_bayes.model.load import LoadedModel, checkpoint_gradients, load_for_training  # noqa: E402
from mergekit_bayes.model.names import saved_parameters  # noqa: E402
from mergekit_bayes.model.save import FRESH_NAME, save_trained  # noqa: E402
from mergekit_bayes.model.sidecar import write_precision  # noqa: E402

__all__ = [
    "FRESH_NAME",
    "BaseIdentity",
    "LoadedModel",
    "check_launch",
    "checkpoint_gradients",
    "load_for_training",
    "save_trained",
    "saved_parameters",
    "write_precision",
]
