"""Recipes and posteriors for people who work in Python."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, overload

from mergekit_bayes import recipe as recipes
from mergekit_bayes.checkpoint.kronecker_tensors import KroneckerTensors, kronecker_tensors
from mergekit_bayes.checkpoint.orientation import transposed_weights
from mergekit_bayes.errors import CheckpointError, PlanError
from mergekit_bayes.merge.curvature import Curvature
from mergekit_bayes.merge.inputs import Input, belongs, open_input
from mergekit_bayes.merge.schemas import method_schemas
from mergekit_bayes.merge.setting import mergeable

if TYPE_CHECKING:
    from torch import Tensor

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

        A layer whose sidecar has Kronecker factors is (out_features, in_features), whatever way it is stored.

        Raises:
            KeyError: there is no such weight.
            NumericalError: the sidecar holds a precision that is not positive and finite, or a factor that is none.
        """
        from mergekit_bayes.posterior import Diagonal, Isotropic

        if name not in self._names:
            raise KeyError(name)
        mean = self._mean(name)
        precision = self._precision(name)
        diagonal = precision if isinstance(precision, float) else self._read(precision).to(mean.dtype)
        factors = None if self._source.sidecar is None else kronecker_tensors(self._source.sidecar, name)
        if factors is not None:
            return self._with_terms(name, mean, diagonal, factors)
        return Isotropic(mean, diagonal) if isinstance(diagonal, float) else Diagonal(mean, diagonal)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _read(self, tensor: TensorInfo) -> Tensor:
        read = self._reader.read_tensor(tensor)
        return read if tensor.dtype == "F64" else read.float()

    def _mean(self, name: str) -> Tensor:
        """A stored tensor, or the update s B A of a module by the name of the base's weight."""
        adapter = self._source.adapter
        if adapter is None or not self._of_updates:
            return self._read(self._source.mean_tensors[name])
        module = adapter.modules.get(name.removesuffix(".weight"))
        if module is None:
            return self._read(adapter.saved[name])
        return module.scaling * self._read(module.b) @ self._read(module.a)

    @property
    def _of_updates(self) -> bool:
        return describes_updates(self._source)

    def _with_terms(self, name: str, mean: Tensor, diagonal: Tensor | float, factors: KroneckerTensors) -> Posterior:
        from mergekit_bayes.merge.operands import OperandReader
        from mergekit_bayes.posterior import Kronecker

        rows, columns = mean.shape
        # Where the weight is not square, the factors know how it is stored.
        square = not self._of_updates and name in transposed_weights(self._source.mean_tensors)
        if square if rows == columns else factors.input.shape[1] != columns:
            mean = mean.T.contiguous()
            diagonal = diagonal if isinstance(diagonal, float) else diagonal.T.contiguous()
        beside = mean.new_tensor(diagonal) if isinstance(diagonal, float) else diagonal
        terms = OperandReader(self._reader, mean.dtype, "cpu").terms(Curvature(factors))
        return Kronecker(mean, beside, terms)

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


def describes_updates(source: Input) -> bool:
    """Whether the sidecar of an adapter describes the updates dW it makes to the base's weights, not its factors."""
    return source.sidecar is not None and source.sidecar.metadata.space == "product"


def load_posterior(path: str | os.PathLike[str], *, precision: float | None = None) -> ModelPosterior:
    """Open a checkpoint or adapter with its precision sidecar as one posterior per tensor.

    Args:
        path: a local folder or hub id of a checkpoint or a LoRA adapter.
        precision: an isotropic precision to use instead of a sidecar.

    Returns:
        A read-only mapping from tensor name to posterior; tensors are read when they are asked for. An adapter's
        tensors are its factors, or with a sidecar of its updates (space product) those, (out_features, in_features),
        by the names of the base's weights.

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
    if source.adapter is not None and describes_updates(source):
        updates = [source.adapter.base_tensor(module) for module in source.adapter.modules]
        return ModelPosterior(source, sorted([*updates, *source.adapter.saved]))
    return ModelPosterior(source, sorted(name for name, tensor in source.mean_tensors.items() if mergeable(tensor)))
