"""Classifiers trained from a base without their head, as files and as the numbers a merge of them must give."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_bayes.merge.run import MergeResult, merge
from tests.merge.builders import (
    CONFIG,
    PREFIX,
    factor_names,
    random_precisions,
    random_tensors,
    write_adapter,
    write_checkpoint,
    write_initial,
    write_precisions,
)
from tests.merge.truth import Truth, merge_tensor

Tensors = Mapping[str, Tensor]

BODY: Mapping[str, tuple[int, ...]] = {
    "embed.weight": (6, 4),
    "layers.0.up.weight": (5, 4),
    "layers.0.up.bias": (5,),
    "norm.weight": (4,),
}
"""The pretrained model, by the names it has when it stands alone."""

HEAD: Mapping[str, tuple[int, ...]] = {"score.weight": (3, 4), "score.bias": (3,)}
OTHER_HEAD: Mapping[str, tuple[int, ...]] = {"lm_head.weight": (6, 4), "lm_head.bias": (6,)}
MODULE = "model.layers.0.up"
LABELS = ("animal", "plant", "stone")
WEIGHTS = (0.75, 0.5)
OWN_PRIOR, PRIOR = 0.5, 0.25
METHODS = ("linear", "task_arithmetic", "hessian_weighted", "gradient_matching", "posterior")

TOLD: Mapping[str, Any] = {"architecture": "ToyForSequenceClassification", "labels": list(LABELS), "pad_token_id": 5}
BASE_CONFIG: Mapping[str, Any] = {**CONFIG, "architectures": ["ToyForCausalLM"], "pad_token_id": None}
CLASSIFIER_CONFIG: Mapping[str, Any] = {
    **CONFIG,
    "architectures": ["ToyForSequenceClassification"],
    "id2label": {str(index): label for index, label in enumerate(LABELS)},
    "label2id": {label: index for index, label in enumerate(LABELS)},
    "pad_token_id": 5,
    "problem_type": "single_label_classification",
}


def body(seed: int, *, root: str = "model.", **options: Any) -> dict[str, Tensor]:
    """Weights of the pretrained model; the root goes before their names."""
    return {f"{root}{name}": tensor for name, tensor in random_tensors(seed, BODY, **options).items()}


def head(seed: int, **options: Any) -> dict[str, Tensor]:
    """Weights of a classification head."""
    return random_tensors(seed, HEAD, **options)


def write_base(folder: Path, *, root: str = "model.", other: bool = True, extra: Tensors | None = None) -> Path:
    """The base: the pretrained model with the head of a language model, or alone."""
    tensors = {**body(0, root=root), **(random_tensors(1, OTHER_HEAD) if other else {}), **(extra or {})}
    return write_checkpoint(folder, tensors, config=BASE_CONFIG)


@dataclass(frozen=True)
class Classifier:
    """An adapter or a full model with a head of its own.

    Attributes:
        folder: where it lies.
        tensors: what is stored, by raw name.
        precisions: of all of it, by the same names.
    """

    folder: Path
    tensors: Tensors
    precisions: Tensors = field(default_factory=dict)

    def posterior(self, name: str, *, raw: str | None = None) -> tuple[Tensor, Tensor]:
        """Mean and precision of one tensor, the sidecar's prior exchanged for that of the merge."""
        raw = name if raw is None else raw
        return self.tensors[raw], self.precisions[raw].double() - OWN_PRIOR + PRIOR


def write_lora(
    folder: Path,
    seed: int,
    *,
    base: Path | None = None,
    start: Tensors | None,
    trained: Tensors | None = None,
    told: Mapping[str, Any] | None = TOLD,
    modules: Sequence[str] = (MODULE,),
) -> Classifier:
    """An adapter of one layer with its head and sidecar.

    Args:
        folder: where to write.
        seed: of factors and head.
        base: whose fingerprint goes into the files.
        start: what the head started from; None leaves the file out.
        trained: the head; drawn for the seed unless given, empty for none.
        told: what the header tells.
        modules: the layers adapted.
    """
    own = head(10 + seed) if trained is None else dict(trained)
    pairs = {}
    for index, module in enumerate(modules):
        drawn = random_tensors(20 + seed + 7 * index, {"a": (2, 4), "b": (5, 2)})
        pairs[module] = (drawn["a"], drawn["b"])
    write_adapter(folder, pairs, saved=own, base=base, told=told, modules_to_save=["score"] if own else None)
    tensors = {f"{PREFIX}{name}": tensor for name, tensor in own.items()}
    for module, pair in pairs.items():
        tensors |= dict(zip(factor_names(module), pair, strict=True))
    return _finish(folder, tensors, seed, base, start)


def write_full(
    folder: Path,
    seed: int,
    *,
    base: Path | None = None,
    start: Tensors | None,
    config: Mapping[str, Any] = CLASSIFIER_CONFIG,
    leave_out: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
) -> Classifier:
    """A full classifier with its sidecar; `leave_out` are tensors that it has not."""
    tensors = {**body(10 + seed, dtype=dtype), **head(20 + seed, dtype=dtype)}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in leave_out}
    write_checkpoint(folder, tensors, config=config)
    return _finish(folder, tensors, seed, base, start)


def _finish(folder: Path, tensors: Tensors, seed: int, base: Path | None, start: Tensors | None) -> Classifier:
    if start is not None:
        write_initial(folder, start, base=base)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    precisions = random_precisions(30 + seed, shapes, above=1.0)
    write_precisions(
        folder,
        precisions,
        base=base,
        prior_precision=OWN_PRIOR,
        num_examples=100,
        loss_unit="example",
        estimator="ivon",
    )
    return Classifier(folder, tensors, precisions)


def recipe(method: str, sources: Sequence[Classifier | Path | str], base: Path | None, **extra: Any) -> dict[str, Any]:
    """A merge of the sources with `WEIGHTS`, in float64."""
    names = [str(source.folder if isinstance(source, Classifier) else source) for source in sources]
    models = [{"model": name, "parameters": {"weight": w}} for name, w in zip(names, WEIGHTS, strict=False)]
    content: dict[str, Any] = {"merge_method": method, "models": models, "dtype": "float64", **extra}
    if base is not None:
        content["base_model"] = str(base)
    if method in ("gradient_matching", "posterior"):
        content.setdefault("precision", {"prior": PRIOR})
    return content


def run(
    method: str, sources: Sequence[Classifier | Path | str], base: Path | None, out: Path, **extra: Any
) -> MergeResult:
    """Merge them."""
    return merge(recipe(method, sources, base, **extra), out, threads=1)


def truth(
    method: str, start: Tensor, posteriors: Sequence[tuple[Tensor, Tensor] | None], weights: Sequence[float] = WEIGHTS
) -> Truth:
    """The oracle of a method for one tensor; None is a source that leaves it at the start."""
    if method == "linear":
        weights = [weight / sum(weights) for weight in weights]
    prior = (start, PRIOR)
    if method == "hessian_weighted":  # has no prior to exchange
        known = [(q[0], q[1] + OWN_PRIOR - PRIOR) for q in posteriors if q is not None]
        present = [weight for weight, q in zip(weights, posteriors, strict=True) if q is not None]
        return merge_tensor(method, prior, known, present)
    return merge_tensor(method, prior, [prior if q is None else q for q in posteriors], weights)
