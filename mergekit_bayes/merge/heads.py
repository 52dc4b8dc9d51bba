"""A dense merge of models with a head that their base has not: the base seen as its fine-tunes see it.

In transformers a model for a task is the pretrained model, one attribute of it, beside a head. A classifier trained
from a base therefore shares with it what lies in that attribute, and nothing else:

    the base                            a classifier trained from it       its root
    bert.*, cls.*                       bert.*, classifier.*               bert.
    embeddings.*, encoder.*, pooler.*   bert.*, classifier.*               bert.
    model.*, lm_head.weight             model.*, score.weight              model.

So the base's tensors get the root before their names where it is not there, what lies outside the root is the head of
the base's own task and is dropped by name, and the new head's start takes its place. A few classes keep a part of the
base's head (ModernBERT: model.*, head.*); then each such module is a root, and all of them must be in the base.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from mergekit_bayes.checkpoint.adapter import Adapter
from mergekit_bayes.checkpoint.files import listed
from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.checkpoint.index import Checkpoint
from mergekit_bayes.errors import CheckpointError, MergekitBayesError, MissingInputError
from mergekit_bayes.merge.dense_inputs import DenseInput
from mergekit_bayes.merge.fresh import Holders, common_starts, left_alone, started_elsewhere
from mergekit_bayes.merge.setting import Setting

POOLER = "pooler."
"""What of the pretrained model itself a head may do without: classes with a head of their own leave it out."""


@dataclass(frozen=True)
class Headed:
    """The inputs of a dense merge under the names that the output has.

    Attributes:
        reference: the base, else the first source.
        sources: the sources.
        fresh: tensors that the base has not, as stored by the sources that have them.
        starts: what they started from, where it is known and common.
        dropped: tensors that the output has no place for, with the reason.
    """

    reference: DenseInput
    sources: list[DenseInput]
    fresh: Mapping[str, Holders] = field(default_factory=dict)
    starts: Mapping[str, TensorInfo] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)


def with_heads(setting: Setting, reference: DenseInput, sources: list[DenseInput]) -> Headed:
    """Bring base and sources under the names of the sources where these have tensors that the base has not.

    Args:
        setting: the recipe and its inputs; problems are added to `setting.problems`.
        reference: the base, else the first source.
        sources: the sources.

    Returns:
        The inputs as they are if no source has a new head, or something stands in the way.
    """
    told = {name for source in sources for name in source.source.starts if name in source.tensors}
    new = told | {name for source in sources for name in source.adapter.fresh}
    if setting.base is None:
        return _without_base(setting, Headed(reference, sources), told)
    stored = reference.home.tensors
    setting.problems.extend(started_elsewhere(setting, {name: stored[name] for name in new if name in stored}))
    new -= stored.keys()
    inputs = Headed(reference, sources)
    problems = list(_unclear(setting, inputs, new))
    setting.problems.extend(problems)
    return inputs if problems or not new else _framed(setting, inputs, new)


def _without_base(setting: Setting, inputs: Headed, told: set[str]) -> Headed:
    """Without a base the sources must have the same tensors; what theirs started from is known for the output too."""
    setting.problems.extend(
        MissingInputError(
            f"{source.source.label}: has a head that {source.home.reference} has not "
            f"({listed(source.adapter.fresh, 6)}); expected a base_model, the model that its adapter was trained on"
        )
        for source in inputs.sources
        if source.adapter.fresh
    )
    fresh = {name: _holders(inputs.sources, name) for name in sorted(told)}
    return replace(inputs, fresh=fresh, starts=common_starts(setting, fresh))


def _holders(sources: Sequence[DenseInput], name: str) -> dict[str, TensorInfo]:
    return {source.source.label: source.stored(name) for source in sources if name in source.tensors}


def _roots(sources: Iterable[DenseInput], new: set[str]) -> list[str]:
    """The modules that everything but the new head lies in, by the full models' own names."""
    names: set[str] = set()
    for source in sources:
        adapter = source.source.adapter
        if adapter is None:
            names |= source.tensors.keys()
        else:
            names |= {*map(Adapter.base_tensor, adapter.modules), *adapter.saved}
    return sorted({f"{name.partition('.')[0]}." for name in names - new})


def _with_head(inputs: Headed, new: set[str]) -> list[DenseInput]:
    return [source for source in inputs.sources if new & source.tensors.keys()]


def _unclear(setting: Setting, inputs: Headed, new: set[str]) -> Iterator[MergekitBayesError]:
    """Every reason why it is not known what the output's tensors are called, or which model they make."""
    base = inputs.reference
    if base.adapter.fresh:
        yield MissingInputError(
            f"base_model: {base.source.label} has an adapter with a head that {base.home.reference} has not "
            f"({listed(base.adapter.fresh, 6)}); expected the model alone, or one that the adapter is merged into"
        )
    if not new:
        return
    who = ", ".join(source.source.label for source in _with_head(inputs, new))
    what = f"{who}: with a head that {base.source.label} has not ({listed(sorted(new), 6)})"
    if setting.task.architecture is None:
        yield CheckpointError(
            f"{what}; a full checkpoint says which class of model it is, and they do not, or differ in it; expected "
            "adapters or models that bayes-merge trained, or space: product, whose adapter loads into any class"
        )
    roots, seen = _roots(_with_head(inputs, new), new), _roots(inputs.sources, new)
    in_base = [root for root in roots if any(name.startswith(root) for name in base.home.tensors)]
    if roots != seen or not roots or (len(roots) > 1 and roots != in_base):
        yield CheckpointError(
            f"{what}, beside tensors of {listed(seen) or 'nothing'}; expected one module, the pretrained model, "
            "with the head outside of it, as in the classes of transformers, in all sources; for adapters, use "
            "space: product"
        )


def _framed(setting: Setting, inputs: Headed, new: set[str]) -> Headed:
    reference, sources = inputs.reference, inputs.sources
    fresh = {name: _holders(sources, name) for name in sorted(new)}
    starts = common_starts(setting, fresh)
    fill = {name: starts.get(name) or next(iter(holders.values())) for name, holders in fresh.items()}
    frame = _Frame(tuple(_roots(sources, new)), frozenset(new), str(setting.task.architecture))
    base = frame.around(reference, fill)
    framed = [frame.around(source, fill if _on(source, reference) else {}) for source in sources]
    setting.problems.extend(_left_alone(setting, framed, fresh, starts))
    surplus = _surplus(base, framed, frame.roots)
    where = " and ".join(f"{root}*" for root in frame.roots)
    outside = f"outside of {where}, the head of the base's own task; no source has it"
    return Headed(
        reference=_without(base, surplus),
        sources=[_without(source, surplus) for source in framed],
        fresh=fresh,
        starts=starts,
        dropped={
            **dict.fromkeys(frame.outside(reference.home), outside),
            **{base.tensors[name].name: reason for name, reason in surplus.items()},
        },
    )


@dataclass(frozen=True)
class _Frame:
    """Names of the output, for inputs that have others or more.

    Attributes:
        roots: what the names of all tensors start with that are not new.
        new: names of tensors that the base has not.
        architecture: class of the output.
    """

    roots: tuple[str, ...]
    new: frozenset[str]
    architecture: str

    def around(self, given: DenseInput, fill: Mapping[str, TensorInfo]) -> DenseInput:
        """An input under the names of the output, with `fill` for what it lacks; a full source has them already."""
        if given.source.adapter is None and not fill:
            return given
        bare = self._is_bare(given.home)
        names = {name: self._name(name, bare=bare) for name in given.tensors}
        tensors = {name: given.tensors[old] for old, name in names.items() if name is not None}
        tensors |= {name: tensor for name, tensor in fill.items() if name not in tensors}
        adapter = replace(
            given.adapter,
            modules={names[old] or old: module for old, module in given.adapter.modules.items()},
            saved={names[old] or old: tensor for old, tensor in given.adapter.saved.items()},
        )
        config = {**given.home.config, "architectures": [self.architecture]}
        return DenseInput(given.source, replace(given.home, tensors=tensors, config=config), tensors, adapter)

    def outside(self, home: Checkpoint) -> list[str]:
        """Names of a checkpoint's tensors that the output has no place for."""
        bare = self._is_bare(home)
        return [name for name in home.tensors if self._name(name, bare=bare) is None]

    def _is_bare(self, home: Checkpoint) -> bool:
        """Whether a checkpoint holds the pretrained model alone, whose names lack the root."""
        return len(self.roots) == 1 and not any(name.startswith(self.roots) for name in home.tensors)

    def _name(self, name: str, *, bare: bool) -> str | None:
        if name in self.new or name.startswith(self.roots):
            return name
        return f"{self.roots[0]}{name}" if bare else None


def _on(source: DenseInput, reference: DenseInput) -> bool:
    """Whether a source is an adapter on the base, by itself or together with it, and so starts where others do."""
    ours, theirs = source.home, reference.home
    return source.source.adapter is not None and (
        ours.folder == theirs.folder or fingerprint(ours.tensors) == fingerprint(theirs.tensors)
    )


def _left_alone(
    setting: Setting, sources: Sequence[DenseInput], fresh: Mapping[str, Holders], starts: Mapping[str, TensorInfo]
) -> Iterator[MissingInputError]:
    """Refuse to average what some adapters leave at a start that is not known."""
    for name, holders in fresh.items():
        absent = [each.source.label for each in sources if name in each.tensors and each.source.label not in holders]
        if absent and name not in starts and not setting.uses_precision:
            yield left_alone(name, absent)


def _surplus(base: DenseInput, sources: Sequence[DenseInput], roots: Sequence[str]) -> dict[str, str]:
    """What of the pretrained model full sources do without, by the output's names, with the reason."""
    if all(source.source.adapter is not None for source in sources):
        return {}  # adapters do not tell what their model has beside what they change
    used: set[str] = set()
    for source in sources:
        changed = {*source.adapter.modules, *source.adapter.saved}
        used |= source.tensors.keys() if source.source.adapter is None else changed
    reasons = {}
    for name in sorted(base.tensors.keys() - used):
        if name.startswith(tuple(f"{root}{POOLER}" for root in roots)):
            reasons[name] = "the base's pooler; no source has it"
        elif not base.tensors[name].floating:
            reasons[name] = f"{base.tensors[name].dtype} is not a weight; no source has it"
    return reasons


def _without(given: DenseInput, names: Mapping[str, str]) -> DenseInput:
    if given.source.adapter is None and not given.tensors.keys() & names.keys():
        return given
    kept = {name: tensor for name, tensor in given.tensors.items() if name not in names}
    return replace(given, home=replace(given.home, tensors=kept), tensors=kept)
