"""The section `data` of a task: what a model is evaluated on, in the words of `mergekit_bayes.recipe.data`.

data: held_out.jsonl
data: {eval: held_out.txt, max_length: 256, packing: true}
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Annotated

from pydantic import BeforeValidator

from mergekit_bayes.recipe.data import DatasetSpec, DataSpec, dataset_mappings
from mergekit_bayes.recipe.problem import refusal, show
from mergekit_bayes.recipe.spec import checked


def _refused(value: object) -> tuple[DatasetSpec, ...]:
    raise refusal("a task is evaluated, not learned; write its rows under `eval`.")


def _evaluation_sets(value: object) -> object:
    found = dataset_mappings(value)
    if not found:
        raise refusal("found no data set; a task is evaluated on at least one.")
    return found


class EvaluationDataSpec(DataSpec):
    """Rows to evaluate on.

    Attributes:
        train: always empty.
        eval: the data sets, in the order of the recipe; at least one. All their rows are evaluated together.
        eval_fraction: always None.
    """

    train: Annotated[tuple[DatasetSpec, ...], checked(_refused)] = ()
    eval: Annotated[tuple[DatasetSpec, ...], BeforeValidator(_evaluation_sets)]
    eval_fraction: Annotated[float | None, checked(_refused)] = None

    def without_effect(self) -> frozenset[str]:
        """Nothing is learned; the rest is as for rows to learn from."""
        return self.as_learned().without_effect() | {"train", "eval_fraction"}

    def as_learned(self) -> DataSpec:
        """The same rows as a section whose training rows they are: they are read and encoded alike."""
        values = {name: getattr(self, name) for name in DataSpec.model_fields if name not in ("train", "eval")}
        return DataSpec.model_construct(**values, train=self.eval, eval=())


def evaluation_data_mapping(value: object) -> object:
    """The section written out, also where it is only a path or a list of data sets."""
    if isinstance(value, EvaluationDataSpec | Mapping):
        return value
    if isinstance(value, bool | int | float):
        raise refusal(f"expected a path or a mapping with `eval`, found {show(value)}.")
    if isinstance(value, str | os.PathLike | list | tuple):
        return {"eval": value}
    return {}
