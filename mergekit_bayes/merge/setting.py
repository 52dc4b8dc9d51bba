"""What a recipe and its opened inputs amount to, before any step is laid out: method, weights, prior, dtypes.

Every rule that a dense and an adapter merge share is here once: which weight a source has for a tensor, where the
prior precision S_0 comes from, what a sidecar's numbers are divided by, in which dtype a tensor is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from mergekit_bayes.checkpoint.dtypes import dtype_named
from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.checkpoint.kronecker_tensors import kronecker_tensors
from mergekit_bayes.errors import (
    MergekitBayesError,
    MethodError,
    MissingInputError,
    RecipeError,
    ShapeMismatchError,
)
from mergekit_bayes.merge.inputs import Input
from mergekit_bayes.merge.registry import MergeMethod
from mergekit_bayes.merge.steps import Operand, Options, Step, Tasks
from mergekit_bayes.merge.task import Task
from mergekit_bayes.recipe import MergeRecipe

MERGEABLE = ("BF16", "F16", "F32", "F64")
"""Dtypes whose values are weights; every other dtype is copied and must agree."""


@dataclass(frozen=True)
class Setting:
    """A recipe with its inputs.

    Attributes:
        recipe: the validated recipe.
        method: its merge method.
        base: the opened base, or None where the recipe names none.
        sources: the opened sources, in the order of the recipe.
        space: "full", "product" or "factor".
        indices: for each source, its index in `recipe.models`.
        task: what the sources were trained to do, as far as they tell.
        problems: filled while planning; a plan exists only if it stays empty.
        notes: things the user should know that are no errors.
        prior_only: by source, the tensors that get the prior's precision for want of their own.
    """

    recipe: MergeRecipe
    method: MergeMethod
    base: Input | None
    sources: tuple[Input, ...]
    space: str
    indices: tuple[int, ...]
    task: Task = field(default_factory=Task)
    problems: list[MergekitBayesError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    prior_only: dict[str, list[str]] = field(default_factory=dict)

    @property
    def needs_prior(self) -> bool:
        """Whether the method uses the prior precision S_0."""
        return self.method.prior == "required"

    @property
    def uses_precision(self) -> bool:
        """Whether the method uses the precisions of the sources."""
        return self.method.precision != "unused"

    def weights_at(self, name: str, position: float) -> tuple[float, ...]:
        """Effective weight of every source for one tensor.

        Args:
            name: name of the tensor in the base, which filters look at.
            position: its layer position in [0, 1], which gradient lists are read at.

        Raises:
            MethodError: weights or parameters the method cannot use.
            RecipeError: a source has no weight for this tensor.
        """
        weights: dict[str, float] = {}
        for source, index in zip(self.sources, self.indices, strict=True):
            path = ("models", index, "parameters", "weight")
            weight = self.recipe.setting("weight", tensor_name=name, t=position, source=index)
            if weight is None:
                raise RecipeError(self.recipe.describe(path, f"no filter gives tensor {name} a weight."))
            task = self.task_names[source.label]
            if weights.setdefault(task, float(weight)) != weight:
                why = (
                    f"{weight:g} for {name}, {weights[task]:g} in another source of task {task}; a task has one weight"
                )
                raise RecipeError(self.recipe.describe(path, why))
        try:
            effective = self.method.effective_weights(list(weights.values()), self._parameters_at(name, position))
        except MethodError as error:
            raise MethodError(f"{name}: {error}") from error
        by_task = dict(zip(weights, effective, strict=True))
        return tuple(by_task[self.task_names[source.label]] for source in self.sources)

    @cached_property
    def task_names(self) -> Mapping[str, str]:
        """The task of every source, by its label: what the recipe says, else one of its own under the same name."""
        named = zip(self.sources, self.indices, strict=True)
        return {source.label: self.recipe.models[index].task or source.label for source, index in named}

    @cached_property
    def tasks(self) -> Tasks:
        """The sources of every task, both sorted; nothing where each is a task of its own."""
        found: dict[str, list[str]] = {}
        for label, task in sorted(self.task_names.items()):
            found.setdefault(task, []).append(label)
        grouped = any(len(labels) > 1 for labels in found.values())
        return tuple((task, tuple(found[task])) for task in sorted(found)) if grouped else ()

    def _parameters_at(self, name: str, position: float, source: int | None = None) -> dict[str, object]:
        """The method's parameters for one tensor, without weights and defaults, of a source or of the whole merge."""
        recipe = self.recipe
        known = recipe.parameters if source is None else (*recipe.models[source].parameters, *recipe.parameters)
        found = {
            key: recipe.setting(key, tensor_name=name, t=position, source=source) for key in known if key != "weight"
        }
        return {key: value for key, value in found.items() if value is not None}

    def options_at(self, name: str, position: float, labels: Sequence[str]) -> Options:
        """The parameters that the method's kernel takes by keyword, for one tensor.

        Args:
            name: name of the tensor in the base, which filters look at.
            position: its layer position in [0, 1].
            labels: of the sources that the kernel is given, in their order; parameters that may differ between
                sources come as one value for each.
        """
        if not self.method.options:
            return ()
        index = dict(zip((source.label for source in self.sources), self.indices, strict=True))
        # Parameters that differ between sources are those of a task's first one.
        heads = [members[0] for _, members in self.tasks] or labels
        own = [self._parameters_at(name, position, index[label]) for label in heads]
        try:
            return tuple(self.method.kernel_options(self._parameters_at(name, position), own).items())
        except MethodError as error:
            self.problems.append(MethodError(f"{name}: {error}"))
            return ()

    def try_weights(self, name: str, position: float) -> tuple[float, ...] | None:
        """`weights_at`, with a failure added to the problems instead of raised."""
        try:
            return self.weights_at(name, position)
        except MergekitBayesError as error:
            self.problems.append(error)
            return None

    @cached_property
    def divisors(self) -> Mapping[str, float]:
        """What the sidecar values of each source are divided by: 1, or its training units for `scale: mean`."""
        return {source.label: self._divisor(source) for source in self.sources}

    @cached_property
    def base_divisor(self) -> float:
        """The same for the sidecar of the base, which may be among the sources with another one."""
        return 1.0 if self.base is None else self._divisor(self.base)

    def _divisor(self, source: Input) -> float:
        if self.recipe.scale == "sum" or source.sidecar is None:
            return 1.0
        units = source.sidecar.metadata.num_examples
        if not units:
            self.problems.append(
                MissingInputError(
                    f"{source.sidecar.path}: num_examples is not recorded, so its precision cannot be converted to "
                    "scale: mean; expected the number of training units, or use scale: sum"
                )
            )
            return 1.0
        return float(units)

    @cached_property
    def scalar_prior(self) -> float | None:
        """S_0 as a scalar: from the recipe, or what the metadata of all sidecars agree on; None where it is a tensor.

        Where updates of adapters are merged as dW, the prior in a sidecar of factors belongs to those, and only the
        recipe can give S_0.
        """
        if not self.needs_prior:
            # A method without prior has S_0 = 0; without precisions, any positive number stands for all of them.
            return 0.0 if self.uses_precision else 1.0
        if self.base is not None and self.base.scalar_precision is not None:
            return self.base.scalar_precision
        if isinstance(self.recipe.precision.prior, int | float):
            return float(self.recipe.precision.prior)
        if self.base is not None and self.base.sidecar is not None and self.space != "factor":
            if self.base.adapter is None:
                return None
            self.notes.append(f"{self.base.label}: the precision of the base's adapter is not used as a prior")
        return self._agreed_prior()

    def _agreed_prior(self) -> float | None:
        known = {
            source.label: source.sidecar.metadata.prior_precision / self.divisors[source.label]
            for source in self.sources
            if source.sidecar is not None and source.sidecar.metadata.prior_precision
        }
        values = sorted(set(known.values()))
        usable = self.space == "factor" or not any(
            source.sidecar is not None and source.sidecar.metadata.space == "factor" for source in self.sources
        )
        if usable and values and values[-1] <= values[0] * (1 + 1e-6):
            return values[0]
        seen = ", ".join(f"{label}: {value:.6g}" for label, value in known.items()) or "none recorded"
        why = "" if usable else " (those belong to the LoRA factors, not to the merged weights)"
        # The base's precisions are those of weights, which says nothing about factors.
        wanted = "a number" if self.space == "factor" else "a number, or a sidecar of the base"
        self.problems.append(
            MissingInputError(
                self.recipe.describe(
                    ("precision", "prior"),
                    f"{self.method.name} needs the prior precision S_0; the sidecars record {seen}{why}; "
                    f"expected {wanted}",
                )
            )
        )
        return 1.0

    def prior_precision(self, name: str) -> TensorInfo | float:
        """S_0 of one tensor."""
        if self.scalar_prior is not None:
            return self.scalar_prior
        assert self.base is not None  # scalar_prior is None only with a base that has a sidecar
        assert self.base.sidecar is not None
        if kronecker_tensors(self.base.sidecar, name) is not None:
            why = f"{self.base.sidecar.path}: has Kronecker factors, which no prior can have; expected precision.prior"
            self.problems.append(MethodError(f"{why}: a number, or the path of a diagonal sidecar of the base"))
            return 1.0
        tensor = self.base.sidecar.tensors.get(name)
        if tensor is not None:
            return tensor
        fallback = self.base.sidecar.metadata.prior_precision
        if fallback:
            return fallback / self.base_divisor
        self.problems.append(
            MissingInputError(
                f"{self.base.sidecar.path}: no precision for {name}, and no prior_precision to fall back on; expected "
                "one of them, or a number for precision.prior"
            )
        )
        return 1.0

    def with_prior(self, operand: Operand, name: str) -> Operand:
        """The operand with S_0 as its precision where it has none of its own."""
        if operand.has_precision:
            return operand
        prior = self.prior_precision(name)
        divisor = self.base_divisor if isinstance(prior, TensorInfo) else 1.0
        return replace(operand, precision=prior, divisor=divisor)

    def prior_share(self, source: Input) -> float | None:
        """The prior that the sidecar of `source` contains and that has to be exchanged for S_0, or None."""
        if not self.needs_prior or source.sidecar is None or not source.sidecar.metadata.prior_precision:
            return None
        share = source.sidecar.metadata.prior_precision / self.divisors[source.label]
        return None if share == self.scalar_prior else share

    def output_dtype(self, name: str, stored: TensorInfo, others: Mapping[str, TensorInfo]) -> str:
        """Dtype a merged tensor is written in: `out_dtype`, else `dtype`, else the one all inputs share."""
        asked = self.recipe.out_dtype or self.recipe.dtype
        if asked is not None:
            return dtype_named(asked)
        different = {label: tensor.dtype for label, tensor in others.items() if tensor.dtype != stored.dtype}
        if different:
            seen = ", ".join(f"{dtype} in {label}" for label, dtype in different.items())
            self.problems.append(
                ShapeMismatchError(
                    f"{name}: dtype {stored.dtype} at {stored.path.name}, but {seen}; "
                    "expected one dtype, or `out_dtype` in the recipe"
                )
            )
        return stored.dtype

    @property
    def precision_dtype(self) -> str | None:
        """Dtype of the merged sidecar, or None where none is written."""
        asked = self.recipe.output.precision
        if asked is False or not self.uses_precision:
            return None
        if not any(source.sidecar is not None or source.scalar_precision is not None for source in self.sources):
            return None
        return dtype_named(asked)

    @property
    def sidecar_space(self) -> str:
        """What the merged sidecar describes: weights (full), factors, or updates (product) where a source's does."""
        if self.space == "full":
            return "full"
        spaces = {source.sidecar.metadata.space for source in self.sources if source.sidecar is not None}
        return "product" if "product" in spaces else "factor"

    def compute_dtype(self, steps: Iterable[Step]) -> str:
        """Dtype of the arithmetic: "F64" where the recipe asks for float64 or float64 is written, else "F32"."""
        asked = "float64" in (self.recipe.dtype, self.recipe.out_dtype)
        return "F64" if asked or any(entry.dtype == "F64" for step in steps for entry in step.entries) else "F32"


def mergeable(tensor: TensorInfo) -> bool:
    """Whether the values of a tensor are weights (a floating dtype of at least 16 bits)."""
    return tensor.dtype in MERGEABLE


def check_dtype(name: str, tensor: TensorInfo) -> ShapeMismatchError | None:
    """The refusal of a dtype that only makes sense together with scales (fp8), or None."""
    if tensor.dtype.startswith("F8"):
        return ShapeMismatchError(
            f"{tensor.path}: {name} is stored as {tensor.dtype}; expected one of {', '.join(MERGEABLE)}; "
            "dequantise the checkpoint first"
        )
    return None
