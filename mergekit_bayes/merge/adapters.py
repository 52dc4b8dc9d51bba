"""Steps of a merge whose inputs and output are LoRA adapters, in product or in factor space."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from mergekit_bayes.checkpoint.adapter import Adapter, LoraModule
from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.checkpoint.index import Checkpoint
from mergekit_bayes.errors import (
    CheckpointError,
    MergekitBayesError,
    MissingInputError,
    MissingTensorError,
    ShapeMismatchError,
)
from mergekit_bayes.merge.attach import Attached, attach, base_weight, recorded_bases
from mergekit_bayes.merge.fresh import common_starts, left_alone, started_elsewhere
from mergekit_bayes.merge.inputs import Input
from mergekit_bayes.merge.posteriors import Names, names_of, no_precision, posterior_of
from mergekit_bayes.merge.setting import Setting
from mergekit_bayes.merge.steps import Layout, LowRank, MergeStep, ModuleStep, Operand, Step
from mergekit_bayes.merge.tensor_steps import merge_step, needs_whole, terms_of
from mergekit_bayes.recipe import layer_positions

Found = Sequence[tuple[Input, LoraModule]]
"""The sources that adapt a module, with what they do to it."""


def adapter_steps(setting: Setting) -> Layout:
    """Lay out a merge of adapters into one adapter.

    Args:
        setting: the recipe and its inputs; problems are added to `setting.problems`.

    Returns:
        One step per adapted module and per tensor that adapters store whole, each sorted by name.
    """
    attached = _attach(setting)
    adapters = [adapter_of(source) for source in setting.sources]
    modules = sorted({name for adapter in adapters for name in adapter.modules})
    saved = sorted({name for adapter in adapters for name in adapter.saved})
    targets = {name: Adapter.base_tensor(name) for name in modules}
    setting.problems.extend(_adapted_and_stored(setting, name) for name in modules if targets[name] in saved)
    positions = layer_positions([*targets.values(), *saved])
    scaling = reference_scaling(setting)
    steps = [_module_step(setting, name, positions[targets[name]], attached, scaling) for name in modules]
    padded = _pad([step for step in steps if step is not None])
    kept = {name: tensor for name in saved if (tensor := _in_base(setting, name)) is not None}
    setting.problems.extend(started_elsewhere(setting, kept))
    fresh = {name: _stored(setting, name) for name in saved if name not in kept}
    starts = common_starts(setting, fresh)
    whole = [_saved_step(setting, name, positions[name], kept.get(name, starts.get(name))) for name in saved]
    return Layout([*padded, *(step for step in whole if step is not None)], fresh=tuple(fresh), starts=starts)


def adapter_of(source: Input) -> Adapter:
    """The adapter of a source; a merge in an adapter space has only such sources."""
    assert source.adapter is not None  # the plan chose an adapter space because every source has one
    return source.adapter


def _attach(setting: Setting) -> dict[str, Attached]:
    """Every adapter on the base, by label; empty where no base is known. What does not belong is a problem."""
    base = setting.base
    if base is not None and base.adapter is not None:
        why = (
            f"base_model: {base.label} is a model with an adapter, which no merged adapter can be loaded on; "
            "expected the model alone, or use space: full"
        )
        setting.problems.append(MissingInputError(why))
        return {}
    ground = next((each.checkpoint for each in (base, *setting.sources) if each is not None and each.checkpoint), None)
    if ground is None:
        setting.problems.extend(_several_bases(setting))
        return {}
    found = {}
    for source in setting.sources:
        setting.problems.extend(_other_model(source, ground))
        found[source.label], problems = attach(source, ground)
        setting.problems.extend(problems)
    return found


def _other_model(source: Input, ground: Checkpoint) -> Iterator[CheckpointError]:
    """Refuse an adapter that comes on a model of its own, which the output would leave out."""
    own = source.checkpoint
    if own is not None and own.folder != ground.folder and fingerprint(own.tensors) != fingerprint(ground.tensors):
        yield CheckpointError(
            f"{source.label}: its adapter is on {own.folder}, which differs from {ground.folder}; a merged "
            "adapter would lose the difference; expected adapters on one model, or use space: full"
        )


def _several_bases(setting: Setting) -> Iterator[MergekitBayesError]:
    """Adapters of different bases, as far as they say."""
    named = {seen: source.label for source in setting.sources for seen in recorded_bases(source)}
    if len(named) > 1:
        seen = ", ".join(f"{label}: {each}" for each, label in sorted(named.items()))
        yield CheckpointError(f"the adapters belong to different bases ({seen}); expected adapters of one base")


def _adapted_and_stored(setting: Setting, name: str) -> CheckpointError:
    adapted = [source.label for source in setting.sources if name in adapter_of(source).modules]
    weight = Adapter.base_tensor(name)
    stored = [source.label for source in setting.sources if weight in adapter_of(source).saved]
    return CheckpointError(
        f"{name}: adapted by {', '.join(adapted)} and stored whole by {', '.join(stored)}; an adapter can hold it in "
        "one way only; expected the same way in all, or use space: full"
    )


def _module_step(
    setting: Setting, name: str, position: float, attached: Mapping[str, Attached], scaling: float
) -> ModuleStep | None:
    target = Adapter.base_tensor(name)
    found = [(source, module) for source in setting.sources if (module := adapter_of(source).modules.get(name))]
    problems = [*_differences(name, found), *_unsuitable(setting, name, found)]
    setting.problems.extend(problems)
    weights = setting.try_weights(target, position)
    if problems or weights is None:
        return None
    first = found[0][1]
    summed = setting.method.scope == "element" and not setting.uses_precision
    mode = "factor" if setting.space == "factor" else ("stack" if summed else "product")
    rank, truncate = _rank(setting, mode, [module for _, module in found])
    prior, transposed = _weight_in_base(found[0], attached)
    operands = {source.label: _module_operand(setting, source, module, prior) for source, module in found}
    ordered = _by_label(setting, weights)
    base, sources = setting.with_prior(Operand("prior", None), prior), tuple(map(operands.get, ordered))
    return ModuleStep(
        name=name,
        mode=mode,
        a_name=first.a.name,
        b_name=first.b.name,
        in_features=first.a.shape[1],
        out_features=first.b.shape[0],
        rank=rank,
        truncate=truncate,
        dtype=setting.output_dtype(name, first.a, {source.label: module.a for source, module in found}),
        precision_dtype=setting.precision_dtype,
        base=base,
        sources=sources,
        weights=tuple(ordered.values()),
        scaling=scaling,
        transposed=transposed,
        options=setting.options_at(target, position, _heard(setting, ordered, operands)),
        whole=needs_whole(setting, list(operands.values())),
        weight=target if setting.sidecar_space == "product" else None,
        terms=terms_of(setting, base, sources, list(ordered.values())),
        tasks=setting.tasks,
    )


def _by_label(setting: Setting, weights: Sequence[float]) -> dict[str, float]:
    """Weights by source, in an order that does not show that of the recipe: sums of floats depend on theirs."""
    return dict(sorted(zip((source.label for source in setting.sources), weights, strict=True)))


def _heard(setting: Setting, ordered: Mapping[str, float], present: Mapping[str, Operand]) -> list[str]:
    """The sources that the method is given for a module: all, but for methods where those without it have no say."""
    return [label for label in ordered if label in present or not setting.method.needs_evidence]


def _weight_in_base(found: tuple[Input, LoraModule], attached: Mapping[str, Attached]) -> tuple[str, bool]:
    """Name of the weight in the base, a tied head's embedding included, and whether it is stored transposed."""
    source, module = found
    target = Adapter.base_tensor(module.name)
    if source.label not in attached:
        return target, False
    here = attached[source.label]
    dense = next((name for name in (target, target.partition(".")[2]) if name in here.modules), target)
    oriented = here.modules.get(dense, module)
    stored = here.heads[dense].name if dense in here.heads else dense
    return stored, oriented.transposed or oriented.kind == "embedding"


def _differences(name: str, found: Found) -> Iterator[ShapeMismatchError]:
    """Updates of one module that cannot be of the same layer."""
    source, first = found[0]
    for other, module in found[1:]:
        seen, expected = (module.b.shape[0], module.a.shape[1]), (first.b.shape[0], first.a.shape[1])
        if seen != expected:
            yield ShapeMismatchError(
                f"{name}: the update is {seen[0]} x {seen[1]} in {other.label}, {expected[0]} x {expected[1]} in "
                f"{source.label}; expected adapters of one base"
            )
        if module.kind != first.kind:
            yield ShapeMismatchError(
                f"{name}: adapted as {module.kind} in {other.label}, as {first.kind} in {source.label}; "
                "expected the same kind of layer"
            )


def _unsuitable(setting: Setting, name: str, found: Found) -> Iterator[CheckpointError]:
    """Updates that do not fit the space, or say nothing where precisions count."""
    source, first = found[0]
    if setting.space == "factor":
        labels = {each.label for each, _ in found}
        if absent := [each.label for each in setting.sources if each.label not in labels]:
            yield MissingTensorError(
                f"{name}: not adapted by {', '.join(absent)}; factor space needs it in all, use space: product"
            )
        for other, module in found[1:]:
            if module.rank != first.rank:
                yield ShapeMismatchError(
                    f"{name}: rank {module.rank} in {other.label}, {first.rank} in {source.label}; "
                    "factor space needs equal ranks, use space: product"
                )
    for each, module in found if setting.uses_precision else ():
        # dW is zero whatever the factors are: their precisions would make it infinitely certain.
        if module.scaling == 0.0:
            yield CheckpointError(
                f"{each.label}: {name} has scaling 0 (lora_alpha), so its factors say nothing about the layer; "
                "expected another lora_alpha, or leave this source out"
            )


def _rank(setting: Setting, mode: str, present: list[LoraModule]) -> tuple[int, int | None]:
    """Rank of the written factors, and the number of directions an approximation keeps (None: nothing is cut)."""
    if mode == "factor":
        return present[0].rank, None
    total = sum(module.rank for module in present)
    asked = setting.recipe.output.rank
    if mode == "stack":
        return (total, None) if asked is None or asked >= total else (asked, asked)
    keep = min(asked or total, present[0].b.shape[0], present[0].a.shape[1])
    return keep, keep


def reference_scaling(setting: Setting) -> float:
    """The scaling at which factors meet in factor space: the largest they were trained with.

    B counts for s B there, so that equal updates with different alphas agree. The prior precision is that of factors
    at the largest scaling; in the usual case all are equal.
    """
    scalings = (
        trained_scaling(source, module)
        for source in setting.sources
        if source.adapter is not None
        for module in source.adapter.modules.values()
    )
    return max((abs(scaling) for scaling in scalings), default=1.0) or 1.0


def trained_scaling(source: Input, module: LoraModule) -> float:
    """The scaling that the prior in the source's sidecar refers to: a merge bakes it into B, and records it."""
    recorded = source.sidecar.metadata.adapter_scaling if source.sidecar is not None else None
    return module.scaling if recorded is None else recorded


def _module_operand(setting: Setting, source: Input, module: LoraModule, weight: str) -> Operand:
    operand = Operand(source.label, None, LowRank(module.a, module.b, module.scaling))
    found = posterior_of(setting, source, operand, Names(weight, weight, Adapter.base_tensor(module.name)))
    if found is None:
        setting.problems.append(no_precision(setting, source, module.name))
    return found or operand


def _pad(steps: list[ModuleStep]) -> list[Step]:
    """Give every module the largest rank, so that the adapter needs no rank pattern; padding rows are zero."""
    largest = max((step.rank for step in steps), default=0)
    return [replace(step, rank=largest) for step in steps]


def _stored(setting: Setting, name: str) -> dict[str, TensorInfo]:
    """A tensor as the adapters that store it whole have it, by their labels."""
    return {source.label: saved[name] for source in setting.sources if name in (saved := adapter_of(source).saved)}


def _in_base(setting: Setting, name: str) -> TensorInfo | None:
    """The tensor of the base that one which adapters store whole replaces."""
    base = setting.base.checkpoint if setting.base is not None else None
    first = next(iter(_stored(setting, name).values()))
    return None if base is None else base_weight(name, first.shape, base)


def _saved_step(setting: Setting, name: str, position: float, kept: TensorInfo | None) -> Step | None:
    """A module that adapters store whole; an adapter without it keeps `kept`, the base's weights or a common start."""
    stored = _stored(setting, name)
    first = next(iter(stored.values()))
    rest = {} if kept is None else {source.label: kept for source in setting.sources if source.label not in stored}
    tensors = {**stored, **rest}
    problems = list(_saved_problems(setting, name, kept, tensors))
    setting.problems.extend(problems)
    weights = setting.try_weights(name, position)
    if problems or weights is None:
        return None
    dense = name if kept is None else kept.name
    operands = {
        source.label: _saved_operand(setting, source, tensors[source.label], dense, own=name)
        for source in setting.sources
    }
    ordered = _by_label(setting, weights).items()
    known = [(operand, weight) for label, weight in ordered if (operand := operands[label]) is not None]
    return merge_step(
        setting,
        MergeStep(
            name=first.name,
            shape=first.shape,
            dtype=setting.output_dtype(name, first, tensors),
            precision_dtype=setting.precision_dtype,
            base=setting.with_prior(Operand("base", kept or first), dense),
            sources=tuple(operand for operand, _ in known),
            weights=tuple(weight for _, weight in known),
            options=setting.options_at(name, position, [operand.label for operand, _ in known]),
            precision_name=name if setting.sidecar_space == "product" else None,
        ),
    )


def _saved_problems(
    setting: Setting, name: str, kept: TensorInfo | None, tensors: dict[str, TensorInfo]
) -> Iterator[MergekitBayesError]:
    absent = [source.label for source in setting.sources if source.label not in tensors]
    if absent:
        yield left_alone(name, absent)
    reference = kept or next(iter(tensors.values()))
    seen = ", ".join(f"{each.shape} in {label}" for label, each in tensors.items() if each.shape != reference.shape)
    if seen:
        yield ShapeMismatchError(f"{name}: shape {seen}; expected {reference.shape}")


def _saved_operand(setting: Setting, source: Input, tensor: TensorInfo, dense: str, *, own: str) -> Operand | None:
    """One source's posterior of a tensor stored whole; None where it leaves it alone and the method has no prior.

    Args:
        setting: for method and prior.
        source: the source.
        tensor: what it has, or the base's tensor.
        dense: name in the base.
        own: name in adapters.
    """
    operand = Operand(source.label, tensor)
    if own not in adapter_of(source).saved and setting.uses_precision:
        return setting.with_prior(operand, dense) if setting.needs_prior else None
    found = posterior_of(setting, source, operand, names_of(tensor, dense))
    if found is None:
        setting.problems.append(no_precision(setting, source, tensor.name))
    return found
