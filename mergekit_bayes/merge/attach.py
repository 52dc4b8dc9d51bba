"""An adapter on its base: which weight each of its tensors changes, and whether the two belong together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from mergekit_bayes.checkpoint.adapter import Adapter, LoraModule
from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.checkpoint.index import Checkpoint
from mergekit_bayes.checkpoint.orientation import orient
from mergekit_bayes.checkpoint.provenance import read_provenance
from mergekit_bayes.errors import CheckpointError, MergekitBayesError, MissingTensorError, ShapeMismatchError
from mergekit_bayes.merge.inputs import Input

EMBEDDING_WORDS = ("emb", "wte", "shared", "word")
"""Parts of names under which input embeddings go; an absent output head can only be tied to one of those."""


@dataclass(frozen=True)
class Attached:
    """What an adapter does to the tensors of its base.

    Attributes:
        modules: LoRA modules by the name of the weight they change, oriented as it is stored.
        saved: tensors that replace those of the base, by their name there.
        heads: output heads that the adapter changes and the base ties instead of storing: the embedding each is
            tied to, by the head's own name.
        fresh: names of tensors stored whole that the base has not, such as a new classification head.
    """

    modules: Mapping[str, LoraModule] = field(default_factory=dict)
    saved: Mapping[str, TensorInfo] = field(default_factory=dict)
    heads: Mapping[str, TensorInfo] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()


def attach(source: Input, base: Checkpoint) -> tuple[Attached, list[MergekitBayesError]]:
    """Find the weights that an adapter changes.

    Args:
        source: an input with an adapter.
        base: the checkpoint it is applied to.

    Returns:
        The adapter by dense names, and every reason why it does not belong to this base.
    """
    assert source.adapter is not None  # the caller attaches adapters only
    adapter = orient(source.adapter, base.tensors)
    modules: dict[str, LoraModule] = {}
    saved: dict[str, TensorInfo] = {}
    heads: dict[str, TensorInfo] = {}
    fresh: list[str] = []
    problems = [*_other_base(source, base), *_other_copies(source, adapter, base.tensors)]
    for name, module in adapter.modules.items():
        weight = adapter.base_tensor(name)
        target = locate(weight, base.tensors)
        if target is None and (tied := tied_head(weight, (module.b.shape[0], module.a.shape[1]), base)) is not None:
            heads[weight], modules[weight] = tied, replace(module, transposed=False)
        elif target is None:
            problems.append(no_target(source, name, base))
        else:
            modules[target] = module
            problems.extend(_other_shape(source, module, base.tensors[target]))
    for name, tensor in adapter.saved.items():
        target = locate(name, base.tensors)
        if target is None and (tied := tied_head(name, tensor.shape, base)) is not None:
            heads[name], saved[name] = tied, tensor
        elif target is None:
            fresh.append(name)
        else:
            saved[target] = tensor
    return Attached(modules, saved, heads, tuple(fresh)), problems


def locate(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """Find the checkpoint's name of an adapted tensor; published checkpoints may lack the model's outermost prefix."""
    if name in tensors:
        return name
    short = name.partition(".")[2]
    return short if short in tensors else None


def base_weight(name: str, shape: tuple[int, ...], base: Checkpoint) -> TensorInfo | None:
    """The tensor of the base that an adapter's tensor of this name stands for, a tied head's embedding included."""
    target = locate(name, base.tensors)
    return tied_head(name, shape, base) if target is None else base.tensors[target]


def ties(config: Mapping[str, object]) -> bool:
    """Whether a configuration ties the output head to the embedding, which is also what saying nothing means."""
    text = config.get("text_config")
    nested = text.get("tie_word_embeddings") if isinstance(text, Mapping) else None
    return bool(config.get("tie_word_embeddings", nested if nested is not None else True))


def can_tie(config: Mapping[str, object], shape: tuple[int, ...]) -> bool:
    """Whether a configuration ties output heads of this shape: those with a row for every word.

    A classifier of two classes has the shape of BERT's embedding of two token types.
    """
    parts = (config, config.get("text_config"))
    sizes = {part["vocab_size"] for part in parts if isinstance(part, Mapping) and type(part.get("vocab_size")) is int}
    return ties(config) and (not sizes or shape[:1] in {(size,) for size in sizes})


def tied_head(name: str, shape: tuple[int, ...], base: Checkpoint) -> TensorInfo | None:
    """The embedding that a head of this name and shape is tied to in a checkpoint that does not store the head."""
    partner = _only_embedding(name, shape, base.tensors) if can_tie(base.config, shape) else None
    return None if partner is None else base.tensors[partner]


def tied_partner(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The one embedding that a stored head of this name can be tied to elsewhere."""
    return _only_embedding(name, tensors[name].shape, tensors) if name in tensors else None


def _only_embedding(head: str, shape: tuple[int, ...], tensors: Mapping[str, TensorInfo]) -> str | None:
    """The embedding of this shape; None unless exactly one fits, for a head's name says nothing about its partner."""
    found = [
        name
        for name, tensor in tensors.items()
        if name != head and tensor.shape == shape and any(word in name for word in EMBEDDING_WORDS)
    ]
    return found[0] if len(found) == 1 and len(shape) == 2 else None


def embeddings_changed(adapter: Attached, base: Checkpoint) -> list[str]:
    """Embeddings an adapter changes in a language model whose output head is its embedding."""
    architectures = base.config.get("architectures")
    names = [str(name) for name in architectures] if isinstance(architectures, list) else []
    if not ties(base.config) or not any("LM" in name or "ConditionalGeneration" in name for name in names):
        return []
    changed = {name for name, module in adapter.modules.items() if module.kind == "embedding"}
    changed |= {name for name in adapter.saved if any(word in name for word in EMBEDDING_WORDS)}
    rows = base.config.get("vocab_size")
    return sorted(name for name in changed if name in base.tensors and base.tensors[name].shape[0] == rows)


def no_target(source: Input, name: str, base: Checkpoint) -> MissingTensorError:
    """The refusal of an adapter that changes what the base has not."""
    return MissingTensorError(
        f"{source.label}: adapts {name}, but {base.reference} has no such tensor; "
        "expected an adapter trained on this base"
    )


def _other_shape(source: Input, module: LoraModule, target: TensorInfo) -> Iterator[MergekitBayesError]:
    if module.weight_shape != target.shape:
        yield ShapeMismatchError(
            f"{source.label}: {module.name} updates a weight of shape {module.weight_shape}, but {target.name} is "
            f"{target.shape} in {target.path.parent.name}; expected an adapter trained on this base"
        )


def _other_copies(source: Input, adapter: Adapter, tensors: Mapping[str, TensorInfo]) -> Iterator[MergekitBayesError]:
    """Refuse an adapter that comes with an embedding or head of its own, which a change of vocabulary leaves behind.

    PEFT stores copies of the base's tensors beside an adapted embedding; they say nothing unless they differ.
    """
    for name, copy in adapter.base_copies.items():
        target = locate(name, tensors)
        if target is None:
            continue
        stored = replace(tensors[target], name=copy.name)
        same_dtype = stored.dtype == copy.dtype
        if stored.shape != copy.shape or (
            same_dtype and fingerprint({copy.name: stored}) != fingerprint({copy.name: copy})
        ):
            yield ShapeMismatchError(
                f"{source.label}: brings its own {name}, shape {copy.shape}, that is not the base's {stored.shape}; "
                "was the vocabulary resized? expected an adapter on the base's own embedding"
            )


def _other_base(source: Input, base: Checkpoint) -> Iterator[MergekitBayesError]:
    """Refuse an adapter that records another base."""
    known = recorded_bases(source)
    expected = fingerprint(base.tensors) if known else None
    for seen in known:
        if seen != expected:
            yield CheckpointError(
                f"{source.label}: belongs to a base with fingerprint {seen}; expected {expected}, "
                f"that of {base.reference}"
            )


def recorded_bases(source: Input) -> list[str]:
    """Fingerprints of the base that an adapter's sidecar and header name; headers only after a merge."""
    recorded = []
    if source.adapter is not None:
        recorded.append(read_provenance(source.adapter.metadata).base_fingerprint)
        beside = [part for part in source.initial if part.path.parent == source.adapter.folder]
        recorded += [part.provenance.base_fingerprint for part in beside]
    if source.sidecar is not None:
        recorded.append(source.sidecar.metadata.base_fingerprint)
    return sorted({seen for seen in recorded if seen is not None})
