"""Inputs seen as full checkpoints: models, adapters on the recipe's base, adapters on models of their own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.checkpoint.index import Checkpoint
from mergekit_bayes.errors import MissingInputError
from mergekit_bayes.merge.attach import Attached, attach
from mergekit_bayes.merge.inputs import Input
from mergekit_bayes.merge.setting import Setting


@dataclass(frozen=True)
class DenseInput:
    """One input seen as a full checkpoint.

    Attributes:
        source: the input.
        home: the checkpoint its dense tensors lie in; the base for an adapter that comes without one.
        tensors: its dense tensors, with a name of their own for heads that the checkpoint ties, and those that an
            adapter brings along and the checkpoint has not.
        adapter: what its adapter does to them; nothing for a checkpoint.
    """

    source: Input
    home: Checkpoint
    tensors: Mapping[str, TensorInfo]
    adapter: Attached

    def stored(self, name: str) -> TensorInfo:
        """The dense tensor under this name, before a LoRA update."""
        return self.adapter.saved.get(name) or self.tensors[name]


def open_dense(source: Input, setting: Setting) -> DenseInput | None:
    """See an input as a full checkpoint.

    Args:
        source: base or source.
        setting: the recipe and its inputs; what does not fit is added to its problems.

    Returns:
        The input; None where there is no checkpoint under an adapter.
    """
    checkpoint = _checkpoint_under(source, setting)
    if checkpoint is None:
        return None
    if source.adapter is None:
        return DenseInput(source, checkpoint, checkpoint.tensors, Attached())
    attached, problems = attach(source, checkpoint)
    setting.problems.extend(problems)
    fresh = {name: source.adapter.saved[name] for name in attached.fresh}
    whole = replace(attached, saved={**attached.saved, **fresh})
    return DenseInput(source, checkpoint, {**checkpoint.tensors, **attached.heads, **fresh}, whole)


def _checkpoint_under(source: Input, setting: Setting) -> Checkpoint | None:
    """The full weights that an input stands for or stands on."""
    if source.checkpoint is not None:
        return source.checkpoint
    if setting.base is None or setting.base.checkpoint is None:
        why = f"{source.label} is an adapter; expected a base_model to merge it into (space: full)"
    elif setting.base.adapter is not None:
        why = (
            f"{source.label} is an adapter, and the base {setting.base.label} has one too, so it is not known what it "
            "was trained on; expected model+adapter"
        )
    else:
        return setting.base.checkpoint
    setting.problems.append(MissingInputError(why))
    return None
