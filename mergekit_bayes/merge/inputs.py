"""The inputs of a merge, opened: headers and configuration only.

One `Input` is the base or one source: a checkpoint, an adapter, or an adapter on a checkpoint of its own
(`model+adapter`), with the precision that goes with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mergekit_bayes.checkpoint.adapter import Adapter, is_adapter, open_adapter
from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.checkpoint.index import Checkpoint, open_checkpoint
from mergekit_bayes.checkpoint.initial import InitialModules, open_initial
from mergekit_bayes.checkpoint.reference import parse_reference, resolve
from mergekit_bayes.checkpoint.sidecar import Sidecar, check_base, check_sidecar, find_sidecar, open_sidecar
from mergekit_bayes.errors import CheckpointError, MergekitBayesError, PlanError, SidecarMismatchError


@dataclass(frozen=True)
class Input:
    """The base or one source of a merge.

    Attributes:
        label: the reference as the recipe writes it.
        checkpoint: the dense weights, or None for an adapter on its own.
        adapter: the LoRA adapter, or None.
        sidecar: its precisions, or None.
        scalar_precision: an isotropic precision given in the recipe, or None.
        initial: what new modules of checkpoint and adapter started from, in this order, where they tell.
    """

    label: str
    checkpoint: Checkpoint | None
    adapter: Adapter | None
    sidecar: Sidecar | None
    scalar_precision: float | None = None
    initial: tuple[InitialModules, ...] = ()

    @property
    def places(self) -> tuple[Path, ...]:
        """Files and folders that are read, and that an output must not replace."""
        parts = (self.checkpoint, self.adapter)
        folders = tuple(part.folder for part in parts if part is not None)
        return folders if self.sidecar is None else (*folders, self.sidecar.path)

    @property
    def mean_tensors(self) -> Mapping[str, TensorInfo]:
        """The tensors that a sidecar of this input describes: the adapter's if there is one, else the checkpoint's."""
        if self.adapter is not None:
            return self.adapter.tensors
        return self.checkpoint.tensors if self.checkpoint is not None else {}

    @property
    def starts(self) -> Mapping[str, TensorInfo]:
        """What tensors that the base lacks started from, by their name in the full model."""
        return {name: tensor for part in self.initial for name, tensor in part.tensors.items()}

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of `mean_tensors`."""
        return fingerprint(self.mean_tensors)

    @property
    def revision(self) -> str | None:
        """Resolved commit of a hub model."""
        part = self.adapter or self.checkpoint
        return part.revision if part is not None else None


def open_input(reference: str, precision: str | float | bool | None, *, base_dir: Path) -> Input:
    """Open the headers of a base or source and of its sidecar.

    Args:
        reference: `path_or_hub_id[@revision][+adapter[@revision]]`.
        precision: the recipe's `precision` of it: None takes the sidecar beside the model if there is one, False none,
            a path that sidecar, a number an isotropic precision.
        base_dir: folder of the recipe; relative paths are tried from the current directory first, then from here.

    Returns:
        The input; whether the sidecar belongs to it is checked by `belongs`.

    Raises:
        CheckpointError: something cannot be read or trusted.
        PlanError: several such things.
    """
    parsed = parse_reference(reference, base_dir=base_dir)
    folder = resolve(parsed.model, parsed.revision, base_dir=base_dir)
    checkpoint, adapter = None, None
    if is_adapter(folder.path):
        if parsed.adapter is not None:
            raise CheckpointError(
                f"{reference}: {parsed.model} is itself an adapter; expected a full model before the `+`."
            )
        adapter = open_adapter(folder.path, reference=reference, revision=folder.revision)
    else:
        checkpoint = open_checkpoint(folder.path, reference=reference, revision=folder.revision)
    if parsed.adapter is not None:
        extra = resolve(parsed.adapter, parsed.adapter_revision, base_dir=base_dir)
        adapter = open_adapter(extra.path, reference=reference, revision=extra.revision)
    described = adapter.folder if adapter is not None else folder.path
    scalar, sidecar = _open_precision(precision, described, base_dir)
    found = [open_initial(part.folder) for part in (checkpoint, adapter) if part is not None]
    initial = tuple(part for part in found if part is not None)
    return Input(reference, checkpoint, adapter, sidecar, scalar, initial)


def _open_precision(
    precision: str | float | bool | None, described: Path, base_dir: Path
) -> tuple[float | None, Sidecar | None]:
    if precision is False:
        return None, None
    if isinstance(precision, int | float):
        return float(precision), None
    if precision is None:
        found = find_sidecar(described)
        return None, open_sidecar(found) if found is not None else None
    for candidate in (Path(precision), base_dir / precision):
        if candidate.exists():
            return None, open_sidecar(candidate)
    return None, open_sidecar(resolve(precision, None, base_dir=base_dir).path)


def belongs(source: Input, base: Input | None) -> list[MergekitBayesError]:
    """Every reason why what lies beside `source`, its sidecar before all, describes something else or another base."""
    if source.sidecar is None:
        return on_its_base(source, base)
    found = check_sidecar(
        source.sidecar,
        mean_tensors=source.mean_tensors,
        mean_fingerprint=source.fingerprint,
        base_fingerprint=_base_fingerprint(source, base),
        adapter=source.adapter,
    )
    return [*found, *_other_scaling(source)]


def _other_scaling(source: Input) -> list[SidecarMismatchError]:
    """Refuse precisions of factors whose scaling was changed in adapter_config.json since they were estimated."""
    if source.adapter is None or source.sidecar is None or source.sidecar.metadata.estimator == "merged":
        return []
    recorded = source.sidecar.metadata.adapter_scaling
    modules = source.adapter.modules.values()
    changed = [] if recorded is None else [m for m in modules if not math.isclose(m.scaling, recorded, rel_tol=1e-6)]
    if not changed:
        return []
    return [
        SidecarMismatchError(
            f"{source.sidecar.path}: describes factors with scaling {recorded:g}; {len(changed)} modules have another "
            f"({changed[0].name}: {changed[0].scaling:g}); expected r and lora_alpha as they were in training"
        )
    ]


def on_its_base(source: Input, base: Input | None) -> list[MergekitBayesError]:
    """The reason why a full checkpoint was not trained from `base`, as far as what lies beside it knows."""
    expected = _base_fingerprint(source, base)
    if source.sidecar is not None:
        return list(check_base(source.sidecar, expected))
    known = {part.provenance.base_fingerprint: part.path for part in source.initial}
    return [
        CheckpointError(
            f"{path}: belongs to a base with fingerprint {seen}; expected {expected}, that of the base in use"
        )
        for seen, path in known.items()
        if None not in (seen, expected) and seen != expected
    ]


def _base_fingerprint(source: Input, base: Input | None) -> str | None:
    """What a checkpoint's sidecar should name as its base; adapters are compared with the weights they stand on."""
    if base is None or base is source or base.checkpoint is None or base.adapter is not None:
        return None
    return None if source.adapter is not None else base.fingerprint


def flatten(error: MergekitBayesError) -> tuple[MergekitBayesError, ...]:
    """The single problems inside an error."""
    return error.problems if isinstance(error, PlanError) else (error,)
