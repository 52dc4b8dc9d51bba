"""A merge in the weights of a model in memory, once or again and again with other weights; nothing is written to disk.

Every tensor goes through the kernel that a merge would use and is rounded to the dtype that a merge would write, so
that what is evaluated is what `bayes-merge` makes of the same recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from mergekit_bayes.checkpoint.dtypes import torch_dtype
from mergekit_bayes.checkpoint.reader import BlockReader
from mergekit_bayes.checkpoint.writer import TensorEntry
from mergekit_bayes.errors import EvaluateError, NonFiniteError, NonPositivePrecisionError
from mergekit_bayes.merge.blocks import Formula, Stored, in_chunks
from mergekit_bayes.merge.modules import run_module
from mergekit_bayes.merge.operands import OperandReader
from mergekit_bayes.merge.plan import MergePlan, plan_merge
from mergekit_bayes.merge.sink import Sink
from mergekit_bayes.merge.steps import CopyStep, MergeStep, ModuleStep, Step, TensorStep
from mergekit_bayes.merge.tensors import run_tensor
from mergekit_bayes.predict.names import weights_of
from mergekit_bayes.recipe import MergeRecipe

__all__ = ["InPlace", "changed_weights", "merge_in_place", "plan_in_place"]

_ADAPTER_PREFIX = "base_model.model."


class InPlace:
    """A merge in the weights of a model; a context manager that puts the base's weights back.

    Args:
        model: the base.
        plan: the merge.
        title: how messages call it.
        max_memory: bytes of sources that are kept between loads; what does not fit is read again.
        restore: whether the base's weights are kept aside and put back; without them there is one load, and it stays.

    Raises:
        EvaluateError: the merge has tensors that the model has not, or not as tensors of their own.
    """

    def __init__(self, model: nn.Module, plan: MergePlan, *, title: str, max_memory: int, restore: bool = True) -> None:
        self._plan, self._restore = plan, restore
        self._targets = _targets(model, plan, title)
        self._kept: dict[str, tuple[Stored, list[Stored]]] = {}
        self._room = max_memory
        self._base: dict[str, Tensor] = {}
        self._reader = BlockReader()
        self._operands = OperandReader(self._reader, torch_dtype(plan.compute_dtype), "cpu")

    def __enter__(self) -> Self:
        with torch.no_grad():
            kept = {name: parameter.detach() for name, parameter in self._targets.items()}
            self._base = {name: values.clone() for name, values in kept.items()} if self._restore else kept
            for step in self._plan.steps:
                if isinstance(step, CopyStep) and step.name in self._targets:
                    self._targets[step.name].copy_(self._reader.read_tensor(step.tensor))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with torch.no_grad():
            for name, values in self._base.items() if self._restore else ():
                self._targets[name].copy_(values)
        self._base = {}
        self._reader.close()

    @torch.no_grad()
    def load(self, steps: Iterable[Step] | None = None) -> None:
        """Gives the model the merged weights.

        Args:
            steps: those of the plan with other weights; None for the plan as it is.

        Raises:
            NumericalError: the merge is not finite, or a merged precision not positive.
        """
        for step in self._plan.steps if steps is None else steps:
            if isinstance(step, ModuleStep):
                self._module(step)
            elif isinstance(step, TensorStep):
                sink = _Memory()
                run_tensor(step, self._plan, self._operands, sink)
                self._set(step.name, sink.found[0].to(torch_dtype(step.dtype)))
            elif isinstance(step, MergeStep):
                self._dense(step)

    def _module(self, step: ModuleStep) -> None:
        sink = _Memory()
        run_module(step, self._plan, self._operands, sink)
        name = _weight_of(step)
        base, (a, b) = self._base[name], sink.found
        update = b.to(base.device) @ a.to(base.device)
        self._targets[name].copy_(base + (update.T if step.transposed else update).to(base.dtype))

    def _dense(self, step: MergeStep) -> None:
        base, sources = self._stored(step)
        precisions = self._plan.method.precision != "unused"
        formula = Formula(
            method=self._plan.method,
            dtype=self._operands.dtype,
            mean_dtype=torch_dtype(step.dtype),
            precision_dtype=None,
            with_mismatch=False,
            floor=self._plan.recipe.precision.floor if precisions else None,
            options=step.options,
        )
        merged = in_chunks(formula)(base, sources, torch.tensor(step.weights, dtype=torch.float64))
        lowest = merged.lowest_precision
        if lowest is not None and not float(lowest) > 0:
            raise NonPositivePrecisionError(
                f"{step.name}: a merged precision is {float(lowest):.3g}; expected positive ones; make negative "
                "weights smaller, prior precision larger, or set precision.floor"
            )
        self._set(step.name, merged.mean)

    def _stored(self, step: MergeStep) -> tuple[Stored, list[Stored]]:
        """Operands of a tensor, read once if there is room for them."""
        if step.name in self._kept:
            return self._kept[step.name]
        base, sources = self._operands.block(step, 0, step.numel)
        size = sum(each.mean.nbytes + each.precision.nbytes for each in (base, *sources))
        if size <= self._room:
            self._room -= size
            self._kept[step.name] = (base, sources)
        return base, sources

    def _set(self, name: str, values: Tensor) -> None:
        low, high = torch.aminmax(values) if values.numel() else (torch.zeros(()), torch.zeros(()))
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            raise NonFiniteError(f"{name}: the merged values are not finite; choose smaller weights")
        target = self._targets[name]
        target.copy_(values.reshape(target.shape))


def plan_in_place(recipe: MergeRecipe, *, recipe_dir: Path | None = None) -> MergePlan:
    """Plans a merge that is only looked at: nothing is written, and no merged precisions are asked for.

    Args:
        recipe: a validated recipe.
        recipe_dir: folder that relative paths are tried from after the current directory.

    Raises:
        PlanError: everything that stands in the way, at once.
    """
    unwritten = recipe.output.model_copy(update={"precision": False, "path": None})
    return plan_merge(recipe.model_copy(update={"output": unwritten}), recipe_dir=recipe_dir)


def merge_in_place(model: nn.Module, plan: MergePlan, *, title: str) -> None:
    """Gives a model the weights of a merge for good; beside the model one tensor of every source is in memory.

    Args:
        model: the base.
        plan: the merge.
        title: how messages call it.

    Raises:
        EvaluateError: the merge has tensors that the model has not, or not as tensors of their own.
        NumericalError: the merge is not finite, or a merged precision not positive.
    """
    with InPlace(model, plan, title=title, max_memory=0, restore=False) as merge:
        merge.load()


def changed_weights(plan: MergePlan) -> frozenset[str]:
    """Names, as a model has them, of the weights that a merge makes or takes from its sources."""
    return frozenset(
        _weight_of(step).removeprefix(_ADAPTER_PREFIX)
        for step in plan.steps
        if not (isinstance(step, CopyStep) and _of_the_base(step, plan))
    )


class _Memory(Sink):
    """Keeps what a step makes of whole tensors."""

    def __init__(self) -> None:
        self.found: list[Tensor] = []

    def mean(self, entry: TensorEntry, values: Tensor, what: str) -> None:
        """Keeps a tensor of the checkpoint."""
        if not bool(values.isfinite().all()):
            raise NonFiniteError(f"{entry.name}: {what} is not finite; choose smaller weights")
        self.found.append(values)

    def precisions(self, values: Mapping[TensorEntry, Tensor]) -> None:
        """Precisions are not evaluated."""

    def factors(self, values: Mapping[TensorEntry, Tensor]) -> None:
        """Nor are their factors."""


def _weight_of(step: Step) -> str:
    """Name of the dense weight that a step changes, as the model has it."""
    return f"{step.name}.weight" if isinstance(step, ModuleStep) else step.name


def _of_the_base(step: CopyStep, plan: MergePlan) -> bool:
    """Whether a step copies what the model has already."""
    return plan.base is None or step.tensor in plan.base.mean_tensors.values()


def _targets(model: nn.Module, plan: MergePlan, title: str) -> dict[str, nn.Parameter]:
    """The parameter behind every tensor that the merge changes, by the name of its step or weight."""
    known = weights_of(model).parameters
    names = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
    found: dict[str, nn.Parameter] = {}
    for step in plan.steps:
        if isinstance(step, CopyStep) and _of_the_base(step, plan):
            continue
        name = _weight_of(step)
        plain = name.removeprefix(_ADAPTER_PREFIX)
        parameter = known.get(plain)
        if parameter is None and isinstance(step, CopyStep):
            continue  # a buffer, which every input has alike
        if parameter is None:
            raise EvaluateError(
                f"{title}: {plain} is no weight of its own in a {type(model).__name__} in memory, so its merge "
                "cannot be made there; expected an architecture whose tensors are the same in files and in memory"
            )
        tied = isinstance(step, ModuleStep) and names.count(id(parameter)) > 1
        if tied or any(parameter is other for other in found.values()):
            raise EvaluateError(
                f"{title}: {plain} shares its memory with another weight (a head tied to the embedding), and "
                "the merge changes one of them only; such merges cannot be made in memory"
            )
        if parameter.is_meta:
            raise EvaluateError(
                f"{title}: {plain} is offloaded, and a merge in memory needs every weight there; expected a device map "
                "that keeps the model on devices, or a method whose mixes share a forward pass (task_arithmetic of "
                "adapters), which leaves the base's weights alone"
            )
        found[name] = parameter
    return found
