"""A merge that is evaluated without being written: planned from headers, made in the weights of its base in memory."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergekit_bayes.checkpoint.dtypes import DTYPES
from mergekit_bayes.checkpoint.files import listed, shown
from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.index import Checkpoint
from mergekit_bayes.data import ModelTask
from mergekit_bayes.errors import MergekitBayesError, MissingTensorError, PlanError, RecipeError
from mergekit_bayes.evaluate.candidate import Candidate, task_in
from mergekit_bayes.merge.in_place import changed_weights, merge_in_place, plan_in_place
from mergekit_bayes.merge.inputs import Input, flatten
from mergekit_bayes.merge.plan import MergePlan
from mergekit_bayes.merge.schemas import method_schemas
from mergekit_bayes.model.base_identity import BaseIdentity, open_base, stored_dtype
from mergekit_bayes.model.load import LoadedModel, longest_row
from mergekit_bayes.model.pretrained import Loading, load_pretrained
from mergekit_bayes.model.tokens import load_tokenizer
from mergekit_bayes.recipe import MergeRecipe, load_recipe
from mergekit_bayes.recipe.evaluate import EvaluatedSpec, EvaluateRecipe
from mergekit_bayes.recipe.model import ModelSpec, TrainingDType

if TYPE_CHECKING:
    from mergekit_bayes.recipe.spec import Entries

__all__ = ["Merged", "open_merged"]


@dataclass(frozen=True)
class Merged(Candidate):
    """A merge.

    Attributes:
        plan: what is merged, and how.
        checkpoint: the model whose weights become those of the merge: the base, else the first source.
        ground: its name and fingerprint.
    """

    plan: MergePlan
    checkpoint: Checkpoint
    ground: BaseIdentity

    @cached_property
    def identity(self) -> Mapping[str, object]:
        """What its numbers depend on: all inputs, and the recipe but for where and how it would be written."""
        written = self.plan.recipe.resolved()
        written.pop("output", None)
        inputs = [list(_identities(each)) for each in self.plan.inputs]
        return {
            "merge": written,
            "rank": self.plan.recipe.output.rank,
            "base": self.ground.fingerprint,
            "inputs": inputs,
        }

    @cached_property
    def fingerprint(self) -> str:
        """Of what it is made of: its weights are not known before it is made."""
        text = json.dumps(self.identity, sort_keys=True, default=str)
        return f"merge-16:{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"

    @property
    def reference(self) -> str:
        """The path of its recipe, else what it is made of."""
        if isinstance(self.spec.merge, str):
            return self.spec.merge
        return f"{self.plan.method.name} of {listed([source.label for source in self.plan.sources])}"

    @property
    def base(self) -> str | None:
        """Of a merged adapter."""
        return None if self.plan.space == "full" else self.checkpoint.reference

    @property
    def task(self) -> ModelTask | None:
        """By the configuration that it would be written with."""
        planned = self.plan.configuration
        return task_in(planned.get("architectures"), planned.get("task_type"), self.plan.task.architecture)

    @property
    def known_labels(self) -> tuple[str, ...] | None:
        """What all sources call them."""
        return self.plan.task.labels

    @property
    def config(self) -> Mapping[str, object]:
        """That it would be written with, or that of a merged adapter's base."""
        return self.plan.configuration if self.plan.space == "full" else self.checkpoint.config

    @property
    def places(self) -> Iterator[Path]:
        """Of everything that is merged."""
        yield self.checkpoint.folder
        for each in self.plan.inputs:
            yield from each.places

    @property
    def about(self) -> str:
        """The method and the number of models."""
        count, weights = len(self.plan.sources), sum(info.numel for info in self.checkpoint.tensors.values())
        models = "1 model" if count == 1 else f"{count} models"
        return f"{self.plan.method.name} of {models}, merged in memory, {weights:,} weights"

    def tokenizer(self) -> Any:
        """The one that a merge is written with: that of the base, else of the first source."""
        return load_tokenizer(self.checkpoint.folder, reference=self.checkpoint.reference)

    def load(self, task: ModelTask, *, dtype: TrainingDType | None, device: torch.device) -> LoadedModel:
        """Loads the base, and gives it the merged weights.

        Raises:
            MergekitBayesError: the base cannot be loaded, the merge cannot be made in it, or gives numbers that are not
                finite.
        """
        reference = self.checkpoint.reference
        tokenizer = self.tokenizer()
        spec = ModelSpec.model_construct(path=reference, task=task, dtype=dtype or self._dtype())
        known = tuple(self.labels or ()) if task == "sequence_classification" else ()
        loading = Loading(spec, None, self.checkpoint, known, device, tokenizer.pad_token_id)
        model, fresh = load_pretrained(loading)
        self._refuse_fresh(fresh)
        merge_in_place(model, self.plan, title=f"model {shown(self.title)}")
        model.eval().requires_grad_(False)
        if getattr(model.config, "use_cache", None) is not None:
            model.config.use_cache = False
        vocabulary = int(model.get_input_embeddings().weight.shape[0])
        return LoadedModel(model, tokenizer, self.ground, longest_row(model), vocabulary)

    def _dtype(self) -> str:
        """What most of its weights would be written as; what the base is stored as, for an adapter."""
        stored = stored_dtype(self.checkpoint)
        if self.plan.space != "full":
            # as `load_trained` reads the base of an adapter
            return str(torch.float32 if stored == torch.float16 else stored).removeprefix("torch.")
        sizes: Counter[str] = Counter()
        for entry in (entry for step in self.plan.steps for entry in step.entries):
            sizes[entry.dtype] += math.prod(entry.shape)
        most = max(sizes, key=lambda name: (sizes[name], DTYPES[name].itemsize))
        return {"BF16": "bfloat16"}.get(most, "float32")

    def _refuse_fresh(self, fresh: Sequence[str]) -> None:
        merged = changed_weights(self.plan)
        random = [module for module in fresh if not any(name.startswith(f"{module}.") for name in merged)]
        if random:
            raise MissingTensorError(
                f"model {shown(self.title)}: neither {shown(self.checkpoint.reference)} nor what is merged holds "
                f"{listed(random)}, which the task needs; expected sources that were trained for this task"
            )


def open_merged(recipe: EvaluateRecipe, index: int, spec: EvaluatedSpec, here: Path) -> Merged:
    """Plans the merge of one entry.

    Args:
        recipe: the evaluation.
        index: place of the entry among its models.
        spec: the entry.
        here: where relative paths may start beside the current directory; those in a recipe of its own start there.

    Raises:
        RecipeError: there is no such merge recipe, or it cannot be read.
        PlanError: everything that stands in the way of the merge, at once.
        ModelError: adapters are merged whose base nobody names.
    """
    assert spec.merge is not None  # the recipe was checked
    merge, folder = _merge_recipe(recipe, index, spec.merge, here)
    try:
        plan = plan_in_place(merge, recipe_dir=folder)
        checkpoint, ground = _ground(plan, folder)
    except MergekitBayesError as error:
        raise PlanError([type(each)(f"model {shown(spec.title)}: {each}") for each in flatten(error)]) from error
    return Merged(spec, recipe.samples_of(spec), None, None, plan, checkpoint, ground)


def _merge_recipe(
    recipe: EvaluateRecipe, index: int, merge: str | Entries[object], here: Path
) -> tuple[MergeRecipe, Path]:
    """The recipe, and the folder that its relative paths may start from."""
    if not isinstance(merge, str):
        return load_recipe(merge.plain(), expect=MergeRecipe, methods=method_schemas()), here
    for place in (Path(merge), here / merge):
        if place.is_file():
            return load_recipe(place, expect=MergeRecipe, methods=method_schemas()), place.parent
        if place.is_dir():
            raise RecipeError(
                recipe.describe(
                    ("models", index, "merge"), f"{shown(merge)} is a folder; what is on disk is a `model`."
                )
            )
    expected = "expected the path of a merge recipe, or the recipe itself as a mapping."
    raise RecipeError(recipe.describe(("models", index, "merge"), f"there is no {shown(merge)}; {expected}"))


def _ground(plan: MergePlan, folder: Path) -> tuple[Checkpoint, BaseIdentity]:
    """The model that is loaded: the base or first source, or what an adapter among them stands on."""
    donor = plan.donor
    if donor.checkpoint is not None:
        checkpoint = donor.checkpoint
        name = donor.label.partition("+")[0].partition("@")[0]
        return checkpoint, BaseIdentity(name, checkpoint.revision, fingerprint(checkpoint.tensors))
    known = plan.configuration.get("base_model_name_or_path")
    if not isinstance(known, str) or not known:
        raise RecipeError(f"{shown(donor.label)}: an adapter that does not name its base; add `base_model`")
    return open_base(known, recipe_dir=folder)


def _identities(source: Input) -> Iterator[object]:
    for part in (source.checkpoint, source.adapter, source.sidecar):
        yield None if part is None else fingerprint(part.tensors)
    yield source.scalar_precision
    if source.adapter is not None:
        yield source.adapter.scalings
