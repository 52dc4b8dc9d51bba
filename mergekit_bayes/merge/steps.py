"""What a plan is made of: plain, frozen data that says which bytes become which bytes.

An `Operand` is one posterior of one tensor as it lies on disk; a step turns operands into output tensors:

    MergeStep    elementwise, streamed in blocks: dense weights, modules that an adapter saved whole
    TensorStep   the same tensors where the merge has to see them whole
    CopyStep     bytes that every input must share: non-float tensors, weights that no source touches
    ModuleStep   one adapted linear layer, adapter in and adapter out: stack, product or factor (see `lora`)

Nothing here opens a file or imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.checkpoint.writer import ShardLayout, TensorEntry
from mergekit_bayes.merge.curvature import Curvature, MergedTerms, precision_entries


@dataclass(frozen=True)
class LowRank:
    """A LoRA update dW = scaling * B @ A on disk, with the precisions of its factors where a sidecar has them.

    Attributes:
        a: factor A, shape (rank, in_features).
        b: factor B, shape (out_features, rank).
        scaling: alpha / rank, or alpha / sqrt(rank) for rsLoRA.
        transposed: the base weight is stored as (in_features, out_features), so dW is added transposed.
        precision_a: precision of A, shape of A, or None.
        precision_b: precision of B, shape of B, or None.
        trained_scaling: the scaling that the prior in the sidecar refers to, where it is not `scaling`: a merge bakes
            the scaling into B, and B's share of the prior with it.
        prior: the prior precision that those precisions contain and that S_0 of dW takes the place of; None to leave
            them as they are.
    """

    a: TensorInfo
    b: TensorInfo
    scaling: float
    transposed: bool = False
    precision_a: TensorInfo | None = None
    precision_b: TensorInfo | None = None
    trained_scaling: float | None = None
    prior: float | None = None

    @property
    def rank(self) -> int:
        """Number of rows of A."""
        return self.a.shape[0]

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Every tensor that has to be read."""
        found = (self.a, self.b, self.precision_a, self.precision_b)
        return tuple(tensor for tensor in found if tensor is not None)


@dataclass(frozen=True)
class Operand:
    """One posterior of one tensor: mean = `mean` + dW of `low_rank`, with its precision.

    Attributes:
        label: the input it belongs to, as messages and the report name it.
        mean: the dense mean; None stands for zeros.
        low_rank: an update added to the mean, or None.
        precision: a sidecar's tensor, a scalar, or None where only factor precisions or nothing is known.
        divisor: what every precision read from a sidecar is divided by (the number of training units for
            `scale: mean`, else 1).
        prior_share: the prior precision S_0t that the sidecar's values contain, already divided by `divisor`;
            the executor replaces it by the merge's common prior, S_t <- S_t - S_0t + S_0. None: nothing to replace.
        curvature: Kronecker terms that S has beside `precision`, or None.
        of_update: `precision` is that of an adapter's update, as (out_features, in_features).
        of_sidecar: its own sidecar says something of this tensor.
        floor: its own precision is raised to at least this, once it has the merge's prior; None to leave it.
    """

    label: str
    mean: TensorInfo | None
    low_rank: LowRank | None = None
    precision: TensorInfo | float | None = None
    divisor: float = 1.0
    prior_share: float | None = None
    curvature: Curvature | None = None
    of_update: bool = False
    of_sidecar: bool = False
    floor: float | None = None

    @property
    def turned(self) -> bool:
        """Whether the precision is stored as (out_features, in_features) and the mean the other way round."""
        return self.of_update and self.low_rank is not None and self.low_rank.transposed

    @property
    def place(self) -> str:
        """The input and its file, as messages name them."""
        return f"{self.label} ({self.mean.path if self.mean is not None else 'adapter'})"

    @property
    def has_precision(self) -> bool:
        """Whether any precision is known for this operand."""
        return self.precision is not None or (self.low_rank is not None and self.low_rank.precision_a is not None)

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Every tensor that has to be read, in a fixed order."""
        dense = tuple(tensor for tensor in (self.mean, self.precision) if isinstance(tensor, TensorInfo))
        terms = self.curvature.tensors if self.curvature is not None else ()
        return dense + terms + (self.low_rank.tensors if self.low_rank is not None else ())

    @property
    def entrywise(self) -> bool:
        """Whether mean and precision can be read in blocks that belong together."""
        return self.curvature is None and not self.turned


Options = tuple[tuple[str, object], ...]
"""The parameters that a kernel takes by keyword, with their values for one tensor; hashable."""


Tasks = tuple[tuple[str, tuple[str, ...]], ...]
"""The sources as a method sees them: names of tasks, each with the labels of the sources that are its components."""


@dataclass(frozen=True)
class MergeStep:
    """Merge one dense tensor, elementwise.

    Attributes:
        name: name of the output tensor.
        shape: its shape.
        dtype: safetensors dtype it is written in.
        precision_dtype: safetensors dtype of its merged precision, or None when none is written.
        base: the shared base and prior precision S_0.
        sources: the task posteriors; a full merge has them in the order of their labels, so that the order of the
            recipe does not decide how sums are rounded.
        weights: one effective weight per source.
        options: the method's own parameters, as its kernel takes them.
        precision_name: name of the tensor in the merged sidecar, where it has another one there.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    precision_dtype: str | None
    base: Operand
    sources: tuple[Operand, ...]
    weights: tuple[float, ...]
    options: Options = ()
    precision_name: str | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The tensors this step writes to the checkpoint."""
        return (TensorEntry(self.name, self.dtype, self.shape),)

    @property
    def precision_entries(self) -> tuple[TensorEntry, ...]:
        """The tensors this step writes to the sidecar."""
        if self.precision_dtype is None:
            return ()
        return (TensorEntry(self.precision_name or self.name, self.precision_dtype, self.shape),)

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Every tensor that has to be read."""
        return self.base.tensors + tuple(tensor for source in self.sources for tensor in source.tensors)


@dataclass(frozen=True)
class TensorStep(MergeStep):
    """Merge one dense tensor that has to be whole in memory: the method, or a posterior's family, is not elementwise.

    Attributes:
        transposed: the weight of a linear layer is stored as (in_features, out_features); it is merged as
            (out_features, in_features).
        terms: the Kronecker terms of its merged precision, or None for a diagonal one.
        tasks: which sources make up one task; nothing where each is one of its own.
    """

    transposed: bool = False
    terms: MergedTerms | None = None
    tasks: Tasks = ()

    @property
    def precision_entries(self) -> tuple[TensorEntry, ...]:
        """The tensors this step writes to the sidecar: a diagonal, Kronecker factors, or both."""
        own = super().precision_entries
        shape = self.shape[::-1] if self.transposed else self.shape
        return precision_entries(own[0], self.terms, shape) if own else ()


@dataclass(frozen=True)
class CopyStep:
    """Copy one tensor; every tensor in `agree` must hold the same bytes.

    Attributes:
        name: name of the output tensor.
        dtype: safetensors dtype it is written in; differs from the input's only between floating dtypes.
        tensor: where it is copied from.
        agree: the same tensor in the other inputs, with their labels.
        reason: why it is not merged, for the plan and the report.
    """

    name: str
    dtype: str
    tensor: TensorInfo
    agree: tuple[tuple[str, TensorInfo], ...]
    reason: str

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.tensor.shape

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The tensors this step writes to the checkpoint."""
        return (TensorEntry(self.name, self.dtype, self.shape),)

    @property
    def precision_entries(self) -> tuple[TensorEntry, ...]:
        """A copied tensor has no precision of its own."""
        return ()

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Every tensor that has to be read."""
        return (self.tensor, *(tensor for _, tensor in self.agree))


@dataclass(frozen=True)
class ModuleStep:
    """Merge one adapted layer into one pair of LoRA factors with scaling 1.

    Attributes:
        name: path of the module in the base model.
        mode: "stack" (exact, the ranks add up), "product" (dW merged, then truncated) or "factor" (A with A, B with B).
        a_name: name of factor A in the output adapter.
        b_name: name of factor B.
        in_features: columns of dW.
        out_features: rows of dW.
        rank: rows of the written A, padded with zeros where the update needs fewer.
        truncate: number of singular directions kept, or None where nothing is cut off.
        dtype: safetensors dtype the factors are written in.
        precision_dtype: dtype of their precisions, or None when none is written.
        base: the prior, mean zero; in product space its precision may be that of the base's weight.
        sources: one operand per source, low rank; None where an adapter leaves this module alone.
        weights: one effective weight per source.
        scaling: in factor space, the scaling that B refers to while it is merged; it is baked into the result.
        transposed: the base stores its weight, and the precision of it, as (in_features, out_features).
        options: the method's own parameters, as its kernel takes them.
        whole: in product space, whether the merge has to see all of dW at once.
        weight: name of the base's weight where the merged sidecar describes dW; None where it describes the factors.
        terms: the Kronecker terms of the merged precision of dW, or None.
        tasks: which sources make up one task; nothing where each is one of its own.
    """

    name: str
    mode: str
    a_name: str
    b_name: str
    in_features: int
    out_features: int
    rank: int
    truncate: int | None
    dtype: str
    precision_dtype: str | None
    base: Operand
    sources: tuple[Operand | None, ...]
    weights: tuple[float, ...]
    scaling: float = 1.0
    transposed: bool = False
    options: Options = ()
    whole: bool = False
    weight: str | None = None
    terms: MergedTerms | None = None
    tasks: Tasks = ()

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of the written A and B."""
        return (self.rank, self.in_features), (self.out_features, self.rank)

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """The tensors this step writes to the adapter."""
        shape_a, shape_b = self.shapes
        return (TensorEntry(self.a_name, self.dtype, shape_a), TensorEntry(self.b_name, self.dtype, shape_b))

    @property
    def precision_entries(self) -> tuple[TensorEntry, ...]:
        """The tensors this step writes to the sidecar."""
        if self.precision_dtype is None:
            return ()
        kind = self.precision_dtype
        if self.weight is not None:
            shape = (self.out_features, self.in_features)
            return precision_entries(TensorEntry(self.weight, kind, shape), self.terms, shape)
        shape_a, shape_b = self.shapes
        return (TensorEntry(self.a_name, kind, shape_a), TensorEntry(self.b_name, kind, shape_b))

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Every tensor that has to be read."""
        sources = tuple(tensor for source in self.sources if source is not None for tensor in source.tensors)
        return self.base.tensors + sources


Step = MergeStep | CopyStep | ModuleStep


def terms_of(step: Step) -> MergedTerms | None:
    """The Kronecker terms that a step writes to the merged sidecar, or None."""
    return step.terms if isinstance(step, TensorStep | ModuleStep) else None


@dataclass(frozen=True)
class Layout:
    """What was laid out, before it is cut into shards.

    Attributes:
        steps: one per output tensor or adapted layer.
        untied: whether the output head has to be untied from the embedding.
        fresh: names of tensors that the base lacks and sources bring along.
        starts: what those started from, where it is known and common.
        dropped: tensors of the base that the output has no place for, with the reason, by name.
    """

    steps: Sequence[Step]
    untied: bool = False
    fresh: tuple[str, ...] = ()
    starts: Mapping[str, TensorInfo] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)


def weights_by_label(step: MergeStep | ModuleStep) -> dict[str, float]:
    """The effective weight of every source that takes part in a step, by its label."""
    pairs = zip(step.sources, step.weights, strict=True)
    return {source.label: weight for source, weight in pairs if source is not None}


@dataclass(frozen=True)
class Unit:
    """The steps of one output shard and of the sidecar shard beside it: what is finished, resumed or redone together.

    Attributes:
        steps: in output order.
        layout: the checkpoint shard.
        precision_layout: the sidecar shard, or None when no step of the unit has a precision.
    """

    steps: tuple[Step, ...]
    layout: ShardLayout
    precision_layout: ShardLayout | None

    @property
    def bytes_read(self) -> int:
        """Bytes the unit reads."""
        return sum(tensor.nbytes for step in self.steps for tensor in step.inputs)

    @property
    def bytes_written(self) -> int:
        """Bytes the unit writes."""
        return self.layout.nbytes + (self.precision_layout.nbytes if self.precision_layout is not None else 0)
