"""Where a run begins: at the start, at its own newest checkpoint, or at one that the recipe names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mergekit_bayes.checkpoint.files import shown
from mergekit_bayes.errors import CheckpointError, FinetuneError
from mergekit_bayes.finetune.checkpoints import Checkpoint, find_checkpoints, load_checkpoint, name_of, newest_whole
from mergekit_bayes.finetune.resume import Change, Effect, recipe_changes
from mergekit_bayes.finetune.saving import FOLDER
from mergekit_bayes.finetune.state import Identity

__all__ = ["Beginning", "choose_beginning"]

_ALLOWED = {False: (Effect.NONE, Effect.LENGTH), True: (Effect.NONE, Effect.LENGTH, Effect.COURSE)}
"""What may have changed, by whether the recipe names the checkpoint."""


@dataclass(frozen=True)
class Beginning:
    """Where a run begins.

    Attributes:
        checkpoint: None for the start.
        own: whether it is one of this output's; its older ones are then kept.
        changes: keys of the recipe that differ and matter, all of them allowed.
        notes: what a person should know.
    """

    checkpoint: Checkpoint | None
    own: bool = True
    changes: tuple[Change, ...] = ()
    notes: tuple[str, ...] = ()

    def changed(self, section: str) -> list[str]:
        """Returns names of the options of a section that differ from those of the checkpoint."""
        return [
            change.key.removeprefix(f"{section}.") for change in self.changes if change.key.startswith(f"{section}.")
        ]


def choose_beginning(
    wanted: bool | str, identity: Identity, own: Path, *, places: Sequence[Path], steps: int
) -> Beginning:
    """Decides where a run begins.

    An interrupted run is continued by the same recipe; keys that change nothing about the weights may differ, and so
    may the length. A checkpoint that the recipe names may also be taken on another course: another learning rate,
    schedule, precision or seed. What it was trained on, and what it is a state of, must be the same.

    Args:
        wanted: the recipe's `resume_from_checkpoint`.
        identity: of the run as the recipe has it now.
        own: folder of this output's checkpoints.
        places: folders that a relative path is tried from.
        steps: of the whole run.

    Raises:
        FinetuneError: the recipe differs in what may not, and the differences are shown; or it ends before.
        CheckpointError: the named checkpoint is not there or not whole.
    """
    if wanted is False:
        return Beginning(None)
    found, faults = newest_whole(own)
    notes = tuple(f"passed over: {fault}" for fault in faults)
    beginning = _own(found, faults, identity) if wanted is True else _named(wanted, found, identity, own, places)
    if beginning.checkpoint is not None and beginning.checkpoint.step > steps:
        taken = f"{name_of(beginning.checkpoint.step)} is beyond the end of this run, which has {steps} steps"
        raise FinetuneError(f"{taken}; expected more `training.max_steps` or `training.num_train_epochs`")
    return replace(beginning, notes=(*notes, *beginning.notes))


def _own(found: Checkpoint | None, faults: Sequence[str], identity: Identity) -> Beginning:
    """The newest checkpoint of an interrupted run, or the start."""
    if found is not None:
        return _begin(found, identity, named=False, own=True)
    if faults:
        seen = "\n".join(f"  {fault}" for fault in faults)
        raise CheckpointError(
            f"no checkpoint of the interrupted run can be used:\n{seen}\n"
            "start anew with `--set training.resume_from_checkpoint=false`, which deletes them"
        )
    return Beginning(None)


def _named(wanted: str, found: Checkpoint | None, identity: Identity, own: Path, places: Sequence[Path]) -> Beginning:
    """The named checkpoint, or the newest one of a run that began from it and was interrupted."""
    if found is not None and found.state["identity"]["origin"] == wanted and not _refused(found, identity, named=True):
        return _begin(found, identity, named=True, own=True)
    path = _locate(wanted, places)
    return _begin(load_checkpoint(path), identity, named=True, own=path.resolve().parent == own.resolve())


def _begin(checkpoint: Checkpoint, identity: Identity, *, named: bool, own: bool) -> Beginning:
    refused = _refused(checkpoint, identity, named=named)
    name = name_of(checkpoint.step)
    if refused:
        remedy = "restore these to continue, or start anew with `--set training.resume_from_checkpoint=false`"
        if not named and not _refused(checkpoint, identity, named=True):
            remedy += ", or name the checkpoint in training.resume_from_checkpoint to take another course from it"
        lines = "\n".join(f"  {fault}" for fault in refused)
        raise FinetuneError(f"{name} of an earlier run is of another recipe:\n{lines}\n{remedy}")
    changes = tuple(change for change in _changes(checkpoint, identity) if change.effect is not Effect.NONE)
    said = (f"continues from {name}", *(f"changed since: {change}" for change in changes))
    return Beginning(checkpoint, own, changes, said)


def _refused(checkpoint: Checkpoint, identity: Identity, *, named: bool) -> list[str]:
    """Every difference that does not allow to go on, in words."""
    saved = checkpoint.state["identity"]
    faults = [str(change) for change in _changes(checkpoint, identity) if change.effect not in _ALLOWED[named]]
    for key, what in (("base", "weights of the base"), ("data", "training rows")):
        if saved[key] != getattr(identity, key):
            faults.append(f"{what}: had the fingerprint {saved[key]}, now {getattr(identity, key)}")
    if saved["global_batch"] != identity.global_batch:
        faults.append(
            f"rows per optimizer step, over all processes: were {saved['global_batch']}, now {identity.global_batch}"
        )
    return faults


def _changes(checkpoint: Checkpoint, identity: Identity) -> list[Change]:
    """Differences of the recipes, without those of names for the same base and the same rows."""
    saved = checkpoint.state["identity"]
    same = [key for key, place in (("base", "model.path"), ("data", "data")) if saved[key] == getattr(identity, key)]
    places = {"base": ("model.path",), "data": ("data.",)}
    harmless = tuple(place for key in same for place in places[key])
    batch = ("training.per_device_train_batch_size", "training.gradient_accumulation_steps")
    return [
        change
        for change in recipe_changes(saved["recipe"], identity.recipe)
        if not (harmless and change.key.startswith(harmless)) and change.key not in batch
    ]


def _locate(wanted: str, places: Sequence[Path]) -> Path:
    """The folder of the named checkpoint; a run or its folder of checkpoints means the newest one in it."""
    for place in places:
        path = place / wanted
        for folder in (path, path / FOLDER):
            found = find_checkpoints(folder)
            if found:
                return found[-1][1]
        if path.is_dir():
            return path
    tried = ", ".join(shown(place / wanted) for place in places)
    raise FinetuneError(f"training.resume_from_checkpoint: no folder {shown(wanted)}; looked at {tried}")
