"""What a task needs and the base has not: the classification head, its labels, and values to start it from.

In transformers a model for a task is the pretrained model, an attribute of it, beside a head. A head that the
checkpoint lacks starts at random; here at values that depend on the seed alone, not on device, dtype, quantisation
or what was drawn before, so that experts trained from one base with one seed share their head's start as they share
their base, and a merge can subtract it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_bayes.checkpoint.files import brief, listed, shown
from mergekit_bayes.errors import MissingTensorError, ModelError, ShapeMismatchError
from mergekit_bayes.model.library import seeded

_POOLER = "pooler"


def label_options(labels: Sequence[str]) -> dict[str, object]:
    """Arguments of `from_pretrained` for a head with one output per label."""
    return {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        # what transformers would make of integer labels, but it would write it into the configuration later on
        "problem_type": "single_label_classification",
    }


def head_modules(model: Any) -> tuple[str, ...]:
    """Names of the modules around the pretrained model that have weights; none if it stands alone."""
    base = model.base_model
    if base is model:
        return ()
    children = model.named_children()
    return tuple(name for name, child in children if child is not base and any(True for _ in child.parameters()))


def pooler_module(model: Any) -> str | None:
    """Name of the pretrained model's own pooler, which checkpoints of language models often lack; None without one."""
    pooler = getattr(model.base_model, _POOLER, None)
    if model.base_model is model or not isinstance(pooler, nn.Module) or not any(True for _ in pooler.parameters()):
        return None
    return f"{model.base_model_prefix}.{_POOLER}"


def find_fresh(model: Any, report: Mapping[str, Any], *, where: str, stored: Sequence[str]) -> tuple[str, ...]:
    """Finds the modules that the checkpoint lacks and that may be new; everything else must have been in it, and used.

    Args:
        model: a model for a task, as loaded.
        report: the loading info that `from_pretrained` returns.
        where: the base, as messages name it.
        stored: names in the checkpoint.

    Returns:
        Names of the modules, sorted; always empty for language models.

    Raises:
        MissingTensorError: the checkpoint lacks other weights, or holds weights that the model has no place for.
        ShapeMismatchError: it holds weights of another shape.
    """
    classifies = "ForSequenceClassification" in type(model).__name__
    _check_shapes(report, head_modules(model) if classifies else (), where)
    missing = set(report["missing_keys"])
    allowed = (*head_modules(model), pooler_module(model)) if classifies else ()
    fresh = tuple(sorted(name for name in allowed if name is not None and _is_missing(model, name, missing)))
    lost = sorted(name for name in missing if not any(name.startswith(f"{module}.") for module in fresh))
    if lost:
        raise MissingTensorError(
            f"{where}: lacks {listed(lost)}, which {type(model).__name__} needs and would start at random; "
            "expected a checkpoint of this architecture"
        )
    surplus = sorted(
        name for name in report["unexpected_keys"] if not (classifies and _is_other_head(model, name, stored))
    )
    if surplus:
        raise MissingTensorError(
            f"{where}: holds {listed(surplus)}, which {type(model).__name__} has no place for; "
            "expected a checkpoint of this architecture"
        )
    return fresh


def check_labels(stored: Mapping[int, str] | None, labels: Sequence[str], where: str) -> None:
    """Refuses labels in another order than the one that a head from the checkpoint was trained with.

    Args:
        stored: `id2label` of the checkpoint.
        labels: of the data, in their order.
        where: the base, as messages name it.

    Raises:
        ModelError: names that differ; generic ones (LABEL_0) say nothing and fit all.
    """
    known = [str(stored[index]) for index in sorted(stored)] if stored else []
    if all(name == f"LABEL_{index}" for index, name in enumerate(known)) or known == list(labels):
        return
    raise ModelError(
        f"{where}: its classification head knows the labels {brief(known)}; the data has {brief(list(labels))}; "
        "expected the same in the same order (set data.labels), or a base without a head"
    )


def starting_values(model: Any, modules: Sequence[str], *, seed: int) -> dict[str, Tensor]:
    """Draws starting values for new modules by the architecture's own rule.

    Args:
        model: has the modules; is not changed.
        modules: their names.
        seed: decides the values, together with the module's name.

    Returns:
        float32 values on CPU by the names of the parameters.
    """
    found: dict[str, Tensor] = {}
    for name in modules:
        twin = copy.deepcopy(model.get_submodule(name)).to(device="cpu", dtype=torch.float32)
        for part in (*twin.modules(), *twin.parameters()):
            part._is_hf_initialized = False  # the mark that `from_pretrained` left, which the rule would heed
        with seeded(seed), torch.no_grad():
            twin.apply(model._init_weights)
        found.update({f"{name}.{key}": value.detach() for key, value in twin.named_parameters()})
    return found


def _check_shapes(report: Mapping[str, Any], heads: Sequence[str], where: str) -> None:
    for name, stored, expected in sorted(report["mismatched_keys"], key=lambda entry: str(entry[0])):
        if any(name.startswith(f"{head}.") for head in heads):
            raise ShapeMismatchError(
                f"{where}: its classification head has {shown(name)} of shape {tuple(stored)}; the data's labels need "
                f"{tuple(expected)}; expected as many labels as it was trained with, or a base without a head"
            )
        raise ShapeMismatchError(
            f"{where}: {shown(name)} has shape {tuple(stored)}; expected {tuple(expected)}, by config.json"
        )


def _is_missing(model: Any, module: str, missing: set[str]) -> bool:
    names = [f"{module}.{name}" for name, _ in model.get_submodule(module).named_parameters()]
    return all(name in missing for name in names)


def _is_other_head(model: Any, name: str, stored: Sequence[str]) -> bool:
    """Whether an unused tensor is the head, or pooler, of the task that the checkpoint was made for."""
    prefix = f"{model.base_model_prefix}."
    if not any(key.startswith(prefix) for key in stored):
        return False  # the pretrained model alone, which must be used up
    return not name.startswith(prefix) or name.startswith(f"{prefix}{_POOLER}.")
