"""Where new modules started: the file beside trained weights that holds what their base does not.

A base without a classification head has no value to subtract from a trained one. Training writes the values that the
head started from beside the result, and a merge takes them for the base's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from mergekit_bayes.checkpoint.files import contained, shown
from mergekit_bayes.checkpoint.header import TensorInfo, read_header
from mergekit_bayes.checkpoint.provenance import Provenance, read_provenance
from mergekit_bayes.checkpoint.shards import raise_together
from mergekit_bayes.errors import CheckpointError

FRESH_NAME = "initial_modules.safetensors"
"""Starting values of modules that the base has not, beside what was trained; what a merge subtracts from them."""


@dataclass(frozen=True)
class InitialModules:
    """Starting values on disk, known by their header.

    Attributes:
        path: the file.
        tensors: by the name of the tensor in the full model, sorted.
        provenance: what the file says about itself.
    """

    path: Path
    tensors: Mapping[str, TensorInfo]
    provenance: Provenance


def open_initial(folder: Path) -> InitialModules | None:
    """Opens the starting values beside a model or adapter: its header, no tensor; None if there are none.

    Raises:
        CheckpointError: the file cannot be read or trusted, or holds something other than floating point numbers.
        PlanError: several such reasons.
    """
    path = contained(folder, FRESH_NAME)
    if not path.exists():
        return None
    header = read_header(path)
    raise_together(
        [
            CheckpointError(f"{shown(path)}: tensor {shown(name)}: its dtype is {info.dtype}; expected a float type")
            for name, info in header.tensors.items()
            if not info.floating
        ]
    )
    return InitialModules(
        path, MappingProxyType(dict(sorted(header.tensors.items()))), read_provenance(header.metadata)
    )
