"""Steps of a merge whose output is a full checkpoint.

Every tensor of every input is accounted for: merged, copied, tied to another one, dropped by a rule that names it, or
refused. Sources may be checkpoints, adapters on the recipe's base, or adapters on a checkpoint of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from mergekit_bayes.checkpoint.adapter import LoraModule
from mergekit_bayes.checkpoint.files import listed
from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.checkpoint.initial import FRESH_NAME
from mergekit_bayes.checkpoint.orientation import transposed_weights
from mergekit_bayes.errors import CheckpointError, MergekitBayesError, MissingTensorError, ShapeMismatchError
from mergekit_bayes.merge.attach import EMBEDDING_WORDS, can_tie, embeddings_changed, tied_partner
from mergekit_bayes.merge.dense_inputs import DenseInput, open_dense
from mergekit_bayes.merge.heads import Headed, with_heads
from mergekit_bayes.merge.posteriors import names_of, no_precision, posterior_of
from mergekit_bayes.merge.setting import Setting, check_dtype, mergeable
from mergekit_bayes.merge.steps import CopyStep, Layout, LowRank, MergeStep, Operand, Step
from mergekit_bayes.merge.task import architecture_of
from mergekit_bayes.merge.tensor_steps import merge_step
from mergekit_bayes.recipe import layer_positions


def dense_steps(setting: Setting) -> Layout:
    """Lay out a dense merge.

    Args:
        setting: the recipe and its inputs; problems are added to `setting.problems`.

    Returns:
        The steps, sorted by tensor name, and what became of tensors that only some inputs have.
    """
    inputs = [open_dense(source, setting) for source in setting.sources]
    reference = _reference(setting, inputs)
    if reference is None or any(found is None for found in inputs):
        return Layout(())
    headed = with_heads(setting, reference, [found for found in inputs if found is not None])
    if setting.problems:
        return Layout(())
    names, heads = _names(setting, headed.reference, headed.sources)
    setting.problems.extend(error for source in headed.sources for error in _changes_a_tied_head(source, heads))
    if setting.problems:
        return Layout(())
    positions = layer_positions(names)
    stored = headed.reference.home.tensors
    headed = replace(
        headed, reference=_tie(headed.reference, heads), sources=[_tie(source, heads) for source in headed.sources]
    )
    turned = transposed_weights({name: headed.reference.stored(name) for name in names})
    steps = [_step(setting, headed, name, positions[name], turned) for name in names]
    return Layout(
        steps=[step for step in steps if step is not None],
        untied=any(name not in stored for name in heads),
        fresh=tuple(headed.fresh),
        starts=headed.starts,
        dropped=headed.dropped,
    )


def _reference(setting: Setting, inputs: list[DenseInput | None]) -> DenseInput | None:
    """The input whose tensor names, dtypes and configuration the output follows: the base, else the first source."""
    if setting.base is None:
        return inputs[0] if inputs else None
    return open_dense(setting.base, setting)


def _names(setting: Setting, reference: DenseInput, sources: list[DenseInput]) -> tuple[list[str], dict[str, str]]:
    """Names of the output's tensors, and for each tensor that some input ties instead of storing, its partner there."""
    inputs = (reference, *sources)
    heads: dict[str, str] = {}
    lost: dict[str, list[DenseInput]] = {}
    for name in sorted({name for source in inputs for name in source.tensors}):
        absent = [source for source in inputs if name not in source.home.tensors]
        if not absent:
            continue
        partner = next((found for source in inputs if (found := tied_partner(name, source.tensors))), None)
        if partner is not None and all(_ties(source, partner) for source in absent):
            heads[name] = partner
            where = ", ".join(dict.fromkeys(source.source.label for source in absent))
            setting.notes.append(f"{name}: tied to {partner} in {where}, stored by the others; written on its own")
        else:
            lost[name] = absent
    unlike = list(_other_class(setting, reference, sources, lost))
    alike = [problem for name, absent in lost.items() for problem in _unaccounted(name, reference, absent, inputs)]
    setting.problems.extend(unlike or alike)
    return sorted({*reference.tensors, *heads}), heads


def _ties(source: DenseInput, partner: str) -> bool:
    return partner in source.tensors and can_tie(source.home.config, source.tensors[partner].shape)


def _changes_a_tied_head(source: DenseInput, heads: Mapping[str, str]) -> Iterator[MergekitBayesError]:
    """Refuse to write an embedding that an adapter changes where the head tied to it would change too.

    The adapter leaves that head alone. A head that some input names gets weights of its own; without its name, which
    only the architecture knows, nothing can be written for it.
    """
    for name in embeddings_changed(source.adapter, source.home):
        if name not in heads.values():
            yield CheckpointError(
                f"{source.source.label}: changes {name}, which is also the output head of {source.home.reference} "
                "(tie_word_embeddings) and would change it too; expected an adapter of other layers, or use "
                "space: product"
            )


def _unaccounted(
    name: str, reference: DenseInput, absent: list[DenseInput], inputs: tuple[DenseInput, ...]
) -> Iterator[MissingTensorError]:
    if name in reference.tensors:
        for source in absent:
            yield MissingTensorError(
                f"{source.source.label}: has no tensor {name}; expected the tensors of {reference.source.label}"
            )
        return
    for source in inputs:
        if name in source.tensors:
            yield MissingTensorError(
                f"{source.source.label}: has a tensor {name} that {reference.source.label} has not; "
                "expected the same tensors in every input"
            )


def _other_class(
    setting: Setting, reference: DenseInput, sources: list[DenseInput], lost: Mapping[str, list[DenseInput]]
) -> Iterator[MissingTensorError]:
    """Models of another class than the base's, whose new head started nobody knows where: one refusal for each."""
    ours = architecture_of(reference.home.config)
    for source in sources if setting.base is not None else ():
        theirs = architecture_of(source.home.config)
        names = [name for name in lost if (name in source.tensors) != (name in reference.tensors)]
        if names and source.source.adapter is None and None not in (ours, theirs) and ours != theirs:
            other = "adapters in space: product" if setting.method.base == "required" else "no base_model"
            yield MissingTensorError(
                f"{source.source.label}: is a {theirs}, {reference.source.label} a {ours}, and {len(names)} tensors "
                f"are in one of them only: {listed(names, 6)}; expected {FRESH_NAME} beside a new head, which "
                f"bayes-merge writes when it trains one; or {other}"
            )


def _tie(source: DenseInput, ties: Mapping[str, str]) -> DenseInput:
    """Give an input the tensors it ties under their own names."""
    absent = {name: source.tensors[partner] for name, partner in ties.items() if name not in source.tensors}
    return replace(source, tensors={**source.tensors, **absent}) if absent else source


def _step(setting: Setting, headed: Headed, name: str, position: float, turned: frozenset[str]) -> Step | None:
    reference, sources = headed.reference, headed.sources
    stored = reference.stored(name)
    others = {source.source.label: source.stored(name) for source in sources}
    # What is new in the output has the dtype that it was trained in; its start may be stored in more digits.
    trained = headed.fresh.get(name) or {reference.source.label: stored, **others}
    first = next(iter(trained))
    problems = _disagreements(name, first, stored, others)
    if problems:
        setting.problems.extend(problems)
        return None
    if not mergeable(stored):
        return CopyStep(name, stored.dtype, stored, tuple(others.items()), f"{stored.dtype} is not a weight")
    dtype = setting.output_dtype(name, trained[first], trained)
    weights = setting.try_weights(name, position)
    if weights is None:
        return None
    untouched = all(others[source.source.label] == stored for source in sources) and not any(
        name in source.adapter.modules for source in (reference, *sources)
    )
    # Only a plain weighted sum (linear without normalisation) changes what all inputs share.
    same = setting.method.base == "required" or setting.uses_precision or abs(sum(weights) - 1.0) < 1e-9
    # A base sidecar's own precisions must reach the merged sidecar; a scalar prior is in its metadata.
    if untouched and same and not (setting.precision_dtype and setting.scalar_prior is None):
        return CopyStep(name, dtype, stored, (), "no source changes it")
    base = _base_operand(setting, reference, name)
    operands = [_operand(setting, source, name, stored) for source in sources]
    # Sums of floats depend on their order; that of the recipe must not show.
    known = sorted(
        ((operand, weight) for operand, weight in zip(operands, weights, strict=True) if operand is not None),
        key=lambda pair: pair[0].label,
    )
    return merge_step(
        setting,
        MergeStep(
            name,
            stored.shape,
            dtype,
            setting.precision_dtype,
            base,
            sources=tuple(operand for operand, _ in known),
            weights=tuple(weight for _, weight in known),
            options=setting.options_at(name, position, [operand.label for operand, _ in known]),
        ),
        transposed=name in turned or any(_stored_transposed(source, name) for source in sources),
    )


def _stored_transposed(source: DenseInput, name: str) -> bool:
    module = source.adapter.modules.get(name)
    return module is not None and module.kind == "linear" and module.transposed


def _base_operand(setting: Setting, reference: DenseInput, name: str) -> Operand:
    stored, module = reference.stored(name), reference.adapter.modules.get(name)
    # A method without a base does not look at its mean, so it need not be read.
    unused = setting.method.base == "unused"
    low_rank = None if module is None or unused else _low_rank(module)
    operand = Operand(reference.source.label, None if unused else stored, low_rank)
    return setting.with_prior(operand, stored.name)


def _operand(setting: Setting, source: DenseInput, name: str, base: TensorInfo) -> Operand | None:
    """One source's posterior of one tensor; None where it has nothing to say (no prior and no precision)."""
    module, stored = source.adapter.modules.get(name), source.stored(name)
    operand = Operand(source.source.label, stored, None if module is None else _low_rank(module))
    if source.source.adapter is not None and module is None and stored == base and setting.uses_precision:
        # What an adapter leaves alone, it knows no more about than the prior, whatever precision its factors have.
        return setting.with_prior(operand, base.name) if setting.needs_prior else None
    # Where a head is tied, its precision is that of the embedding.
    found = posterior_of(setting, source.source, operand, names_of(stored, base.name, module))
    if found is None:
        setting.problems.append(no_precision(setting, source.source, name))
    return found


def _low_rank(module: LoraModule) -> LowRank:
    return LowRank(module.a, module.b, module.scaling, module.transposed or module.kind == "embedding")


def _disagreements(
    name: str, base_label: str, stored: TensorInfo, others: Mapping[str, TensorInfo]
) -> list[MergekitBayesError]:
    found: list[MergekitBayesError] = []
    refused = check_dtype(name, stored)
    if refused is not None:
        found.append(refused)
    for label, tensor in others.items():
        if tensor.shape != stored.shape:
            found.append(
                ShapeMismatchError(
                    f"{name}: shape {tensor.shape} in {label}, {stored.shape} in {base_label}; "
                    f"expected equal shapes{_vocabulary_hint(name, tensor, stored)}"
                )
            )
        elif tensor.dtype != stored.dtype and not (mergeable(tensor) and mergeable(stored)):
            found.append(
                ShapeMismatchError(
                    f"{name}: dtype {tensor.dtype} in {label}, {stored.dtype} in {base_label}; "
                    "expected the same dtype (weights are never cast from or to integers)"
                )
            )
    return found


def _vocabulary_hint(name: str, tensor: TensorInfo, stored: TensorInfo) -> str:
    rows_only = len(tensor.shape) == len(stored.shape) == 2 and tensor.shape[1] == stored.shape[1]
    if rows_only and (any(word in name for word in EMBEDDING_WORDS) or "head" in name):
        return "; was the vocabulary resized? resize it back, or give every model the same tokenizer"
    return ""
