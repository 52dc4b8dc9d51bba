"""Steps of a merge whose inputs and output are LoRA adapters, in product or in factor space."""

from __future__ import annotations

from dataclasses import replace

from mergekit_bayes.checkpoint.adapter import Adapter, LoraModule
from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.errors import (
    MergekitBayesError,
    MissingInputError,
    MissingTensorError,
    ShapeMismatchError,
)
from mergekit_bayes.merge.attach import attach, base_weight
from mergekit_bayes.merge.inputs import Input
from mergekit_bayes.merge.setting import Setting
from mergekit_bayes.merge.steps import LowRank, MergeStep, ModuleStep, Operand, Step
from mergekit_bayes.recipe import layer_positions


def adapter_steps(setting: Setting) -> list[Step]:
    """Lay out a merge of adapters into one adapter.

    Args:
        setting: the recipe and its inputs; problems are added to `setting.problems`.

    Returns:
        One step per adapted module and per tensor that adapters store whole, sorted by name.
    """
    adapters = [_adapter_of(source) for source in setting.sources]
    _check_against_base(setting)
    modules = sorted({name for adapter in adapters for name in adapter.modules})
    saved = sorted({name for adapter in adapters for name in adapter.saved})
    targets = {name: adapters[0].base_tensor(name) for name in modules}
    positions = layer_positions([*targets.values(), *saved])
    steps = [_module_step(setting, adapters, name, targets[name], positions[targets[name]]) for name in modules]
    padded = _pad([step for step in steps if step is not None])
    whole = [_saved_step(setting, adapters, name, positions[name]) for name in saved]
    return [*padded, *(step for step in whole if step is not None)]


def _adapter_of(source: Input) -> Adapter:
    assert source.adapter is not None  # the plan chose an adapter space because every source has one
    return source.adapter


def _check_against_base(setting: Setting) -> None:
    base = setting.base.checkpoint if setting.base is not None else None
    for source in setting.sources:
        home = source.checkpoint or base
        if home is not None:
            setting.problems.extend(attach(source, home)[1])


def _module_step(
    setting: Setting, adapters: list[Adapter], name: str, target: str, position: float
) -> ModuleStep | None:
    found = [adapter.modules.get(name) for adapter in adapters]
    present = [module for module in found if module is not None]
    problems = _module_problems(setting, name, found)
    if problems:
        setting.problems.extend(problems)
        return None
    weights = setting.try_weights(target, position)
    if weights is None:
        return None
    first = present[0]
    dtype = setting.output_dtype(
        name,
        first.a,
        {source.label: module.a for source, module in zip(setting.sources, found, strict=True) if module is not None},
    )
    mode = "factor" if setting.space == "factor" else ("product" if setting.uses_precision else "stack")
    rows, columns = first.b.shape[0], first.a.shape[1]
    rank, truncate = _rank(setting, mode, present, min(rows, columns))
    return ModuleStep(
        name=name,
        mode=mode,
        a_name=first.a.name,
        b_name=first.b.name,
        in_features=columns,
        out_features=rows,
        rank=rank,
        truncate=truncate,
        dtype=dtype,
        precision_dtype=setting.precision_dtype,
        base=setting.with_prior(Operand("prior", None), target),
        sources=tuple(
            None if module is None else _module_operand(setting, source, module, target)
            for source, module in zip(setting.sources, found, strict=True)
        ),
        weights=weights,
    )


def _rank(setting: Setting, mode: str, present: list[LoraModule], limit: int) -> tuple[int, int | None]:
    """Rank of the written factors, and the number of directions an approximation keeps (None: nothing is cut)."""
    if mode == "factor":
        return present[0].rank, None
    total = sum(module.rank for module in present)
    asked = setting.recipe.output.rank
    if mode == "stack":
        return (total, None) if asked is None or asked >= total else (asked, asked)
    keep = min(asked or total, limit)
    return keep, keep


def _module_problems(setting: Setting, name: str, found: list[LoraModule | None]) -> list[MergekitBayesError]:
    present = [(s.label, m) for s, m in zip(setting.sources, found, strict=True) if m is not None]
    label, first = present[0]
    problems: list[MergekitBayesError] = []
    for other, module in present[1:]:
        if (module.b.shape[0], module.a.shape[1]) != (first.b.shape[0], first.a.shape[1]):
            problems.append(
                ShapeMismatchError(
                    f"{name}: the update is {module.b.shape[0]} x {module.a.shape[1]} in {other}, "
                    f"{first.b.shape[0]} x {first.a.shape[1]} in {label}; expected adapters of one base"
                )
            )
        if module.kind != first.kind:
            problems.append(
                ShapeMismatchError(
                    f"{name}: adapted as {module.kind} in {other}, as {first.kind} in {label}; "
                    "expected the same kind of layer"
                )
            )
        if setting.space == "factor" and module.rank != first.rank:
            problems.append(
                ShapeMismatchError(
                    f"{name}: rank {module.rank} in {other}, {first.rank} in {label}; "
                    "factor space needs equal ranks, use space: product"
                )
            )
    if setting.space == "factor" and len(present) < len(found):
        absent = [s.label for s, m in zip(setting.sources, found, strict=True) if m is None]
        problems.append(
            MissingTensorError(
                f"{name}: not adapted by {', '.join(absent)}; factor space needs it in all, use space: product"
            )
        )
    return problems


def _module_operand(setting: Setting, source: Input, module: LoraModule, target: str) -> Operand:
    operand = Operand(source.label, None, LowRank(module.a, module.b, module.scaling))
    found = setting.posterior_of(source, operand, target)
    if found is None:
        setting.problems.append(setting.no_precision(source, module.name))
    return found or operand


def _pad(steps: list[ModuleStep]) -> list[Step]:
    """Give every module the largest rank, so that the adapter needs no rank pattern; padding rows are zero."""
    largest = max((step.rank for step in steps), default=0)
    return [replace(step, rank=largest) for step in steps]


def _saved_step(setting: Setting, adapters: list[Adapter], name: str, position: float) -> Step | None:
    """A module that adapters store whole; an adapter without it keeps the base's weights."""
    stored = next(adapter.saved[name] for adapter in adapters if name in adapter.saved)
    base = setting.base.checkpoint if setting.base is not None else None
    base_tensor = base_weight(name, stored.shape, base) if base is not None else None
    found = [adapter.saved.get(name, base_tensor) for adapter in adapters]
    absent = [s.label for s, tensor in zip(setting.sources, found, strict=True) if tensor is None]
    if absent or (base_tensor is None and setting.method.base == "required"):
        setting.problems.append(
            MissingInputError(
                f"{name}: stored whole by an adapter, so the base's weights are needed"
                f"{' (' + ', '.join(absent) + ' leave it alone)' if absent else ''}; expected a base_model"
            )
        )
        return None
    tensors = {s.label: tensor for s, tensor in zip(setting.sources, found, strict=True) if tensor is not None}
    reference = base_tensor or stored
    wrong = {label: tensor.shape for label, tensor in tensors.items() if tensor.shape != reference.shape}
    if wrong:
        seen = ", ".join(f"{shape} in {label}" for label, shape in wrong.items())
        setting.problems.append(ShapeMismatchError(f"{name}: shape {seen}; expected {reference.shape}"))
        return None
    weights = setting.try_weights(name, position)
    if weights is None:
        return None
    return MergeStep(
        name=stored.name,
        shape=reference.shape,
        dtype=setting.output_dtype(name, stored, tensors),
        precision_dtype=setting.precision_dtype,
        base=setting.with_prior(Operand("base", reference), name),
        sources=tuple(_saved_operand(setting, source, tensors[source.label]) for source in setting.sources),
        weights=weights,
    )


def _saved_operand(setting: Setting, source: Input, tensor: TensorInfo) -> Operand:
    operand = Operand(source.label, tensor)
    found = setting.posterior_of(source, operand, tensor.name)
    if found is None:
        setting.problems.append(setting.no_precision(source, tensor.name))
    return found or operand
