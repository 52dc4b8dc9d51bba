"""Recipes and posteriors for people who work in Python."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, overload

from mergekit_bayes import recipe as recipes
from mergekit_bayes.errors import CheckpointError, PlanError
from mergekit_bayes.merge.inputs import Input, belongs, open_input
from mergekit_bayes.merge.schemas import method_schemas
from mergekit_bayes.merge.setting import mergeable

if TYPE_CHECKING:
    from mergekit_bayes.checkpoint.header import TensorInfo
    from mergekit_bayes.checkpoint.reader import BlockReader
    from mergekit_bayes.posterior import Posterior

R = TypeVar("R", bound=recipes.Recipe)


@overload
def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, object], *, overrides: Sequence[str] = ...
) -> recipes.AnyRecipe: ...


@overload
def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, object], *, expect: type[R], overrides: Sequence[str] = ...
) -> R: ...


def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, object],
    *,
    expect: type[recipes.Recipe] = recipes.Recipe,
    overrides: Sequence[str] = (),
) -> recipes.Recipe:
    """Read and check a recipe, a merge against the registered methods; no model is opened.

    Args:
        source: path of a recipe, or its content as a dictionary.
        expect: the recipe's class, for callers that take recipes of one kind only.
        overrides: `key.path=value` settings that are applied before checking.

    Returns:
        The validated recipe, of the class that belongs to its kind.

    Raises:
        RecipeError: every problem at once, each with file, line, column and key.
    """
    return recipes.load_recipe(source, expect=expect, methods=method_schemas(), overrides=overrides)


class ModelPosterior(Mapping[str, "Posterior"]):
    """One posterior per weight tensor of a model, read from disk when asked for.

    Args:
        source: the opened model with its precision.
        names: tensors that are weights, sorted.
    """

    def __init__(self, source: Input, names: Sequence[str]) -> None:
        from mergekit_bayes.checkpoint.reader import BlockReader

        self._source = source
        self._names = tuple(names)
        self._reader: BlockReader = BlockReader()

    def __getitem__(self, name: str) -> Posterior:
        """Mean and precision of one tensor, in float32 (float64 where it is stored so).

        Raises:
            KeyError: there is no such weight.
            NumericalError: the sidecar holds a precision that is not positive and finite.
        """
        from mergekit_bayes.posterior import Diagonal, Isotropic

        if name not in self._names:
            raise KeyError(name)
        mean = self._read(self._source.mean_tensors[name])
        precision = self._precision(name)
        if isinstance(precision, float):
            return Isotropic(mean, precision)
        return Diagonal(mean, self._read(precision).to(mean.dtype))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _read(self, tensor: TensorInfo):  # type: ignore[no-untyped-def]  # a torch.Tensor; torch is not imported here
        read = self._reader.read_tensor(tensor)
        return read if tensor.dtype == "F64" else read.float()

    def _precision(self, name: str) -> TensorInfo | float:
        if self._source.scalar_precision is not None:
            return self._source.scalar_precision
        sidecar = self._source.sidecar
        assert sidecar is not None  # load_posterior refuses a model without precision
        found = sidecar.tensors.get(name)
        if found is not None:
            return found
        if not sidecar.metadata.prior_precision:
            raise CheckpointError(f"{sidecar.path}: no precision for {name} and no prior_precision to fall back on")
        return sidecar.metadata.prior_precision


def load_posterior(path: str | os.PathLike[str], *, precision: float | None = None) -> ModelPosterior:
    """Open a checkpoint or adapter with its precision sidecar as one posterior per tensor.

    Args:
        path: a local folder or hub id of a checkpoint or a LoRA adapter.
        precision: an isotropic precision to use instead of a sidecar.

    Returns:
        A read-only mapping from tensor name to posterior; tensors are read when they are asked for. An adapter's
        tensors are its factors.

    Raises:
        CheckpointError: the folder cannot be read or has no precision.
        PlanError: the sidecar does not belong to the folder.
    """
    source = open_input(os.fspath(path), precision, base_dir=Path.cwd())
    if source.sidecar is None and source.scalar_precision is None:
        raise CheckpointError(
            f"{path}: has no precision sidecar (precision.safetensors); expected one, or `precision=` as a number"
        )
    problems = belongs(source, None)
    if problems:
        raise PlanError(problems)
    return ModelPosterior(source, sorted(name for name, tensor in source.mean_tensors.items() if mergeable(tensor)))
