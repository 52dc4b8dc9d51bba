"""How a sidecar of the family `kronecker` stores the curvature of a linear layer.

For a weight W, (out, in), the curvature is a sum of terms  H[W] = sum_k G_k W A_k  (Martens and Grosse 2015, arXiv
1503.05671, section 3), at the scale of the data: summed over the N units, and without the prior, so that

    S = S_0 + sum_k G_k (x) A_k

Tensors, by the name `w` of the weight (which a model may store transposed; these never are):

    w.input_factor    (terms, in, in)      A_k, symmetric
    w.output_factor   (terms, out, out)    G_k, symmetric; where it is absent, G_k is the identity
    w.eigenvalues     (terms, out, in)     L_k >= 0. Where it is present the factors hold orthonormal bases, in columns,
                                           and H[W] = sum_k U_G (L_k * (U_G^T W U_A)) U_A^T
                                           (George et al. 2018, arXiv 1806.03884, section 3)
    w                 the weight's shape   what is diagonal in S, prior included; where it is absent, the prior is the
                                           number in the metadata

Tensors without factors have a diagonal precision under their own name, as in the family `diagonal`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

from mergekit_bayes.checkpoint.files import shown
from mergekit_bayes.errors import NonFiniteError, NonPositivePrecisionError, NumericalError

if TYPE_CHECKING:
    import torch

    from mergekit_bayes.checkpoint.header import TensorInfo
    from mergekit_bayes.checkpoint.reader import BlockReader
    from mergekit_bayes.checkpoint.sidecar import Sidecar
    from mergekit_bayes.posterior import Term

INPUT_FACTOR, OUTPUT_FACTOR, EIGENVALUES = "input_factor", "output_factor", "eigenvalues"
PARTS = (INPUT_FACTOR, OUTPUT_FACTOR, EIGENVALUES)
"""What follows the name of a weight and a dot."""

_ROUNDING = 1e-5  # of the largest entry: what float32 sums in another order may differ by


class KroneckerTensors(NamedTuple):
    """The stored terms of one weight.

    Attributes:
        input: (terms, in, in): A, or its basis where there are eigenvalues.
        output: (terms, out, out): G, or its basis; None for the identity.
        eigenvalues: (terms, out, in), or None.
    """

    input: TensorInfo
    output: TensorInfo | None
    eigenvalues: TensorInfo | None

    @property
    def terms(self) -> int:
        """Number of terms."""
        return self.input.shape[0]


def kronecker_tensors(sidecar: Sidecar, weight: str) -> KroneckerTensors | None:
    """Returns the factors of a weight, or None if the sidecar has none for it.

    Args:
        sidecar: as opened; of a family without factors it has none.
        weight: the name of a tensor of the checkpoint, or in product space of the base's weight.
    """
    if sidecar.metadata.family != "kronecker":
        return None
    parts = [sidecar.tensors.get(f"{weight}.{part}") for part in PARTS]
    return None if parts[0] is None else KroneckerTensors(parts[0], parts[1], parts[2])


def read_terms(
    factors: KroneckerTensors, reader: BlockReader, *, dtype: torch.dtype, device: torch.device | str
) -> list[Term]:
    """Reads the terms of one weight, checked.

    Args:
        factors: where they lie.
        reader: the open input files.
        dtype: what they become.
        device: where they go.

    Raises:
        NumericalError: a factor is not finite or not symmetric, or a curvature is negative.
    """
    from mergekit_bayes.posterior import Term

    parts = []
    for part, tensor in zip(PARTS, factors, strict=True):
        values = None if tensor is None else reader.read_tensor(tensor)
        if values is not None and tensor is not None:
            check_factor(tensor.name, part, values, basis=factors.eigenvalues is not None)
            values = values.to(device=device, dtype=dtype)
        parts.append([None] * factors.terms if values is None else list(values.unbind()))
    return [Term(a, g, e) for a, g, e in zip(*parts, strict=True) if a is not None]


def split_name(name: str) -> tuple[str, str | None]:
    """Returns the weight that a tensor of a `kronecker` sidecar belongs to, and which part: None for its diagonal."""
    weight, _, part = name.rpartition(".")
    return (weight, part) if weight and part in PARTS else (name, None)


def factored_weights(tensors: Mapping[str, object]) -> dict[str, tuple[str, ...]]:
    """Returns the parts that are there of each weight that has any, sorted by weight."""
    found: dict[str, tuple[str, ...]] = {}
    for name in sorted(tensors):
        weight, part = split_name(name)
        if part is not None:
            found[weight] = (*found.get(weight, ()), part)
    return dict(sorted(found.items()))


def layout_faults(tensors: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Factors that cannot belong together, whatever they describe.

    Args:
        tensors: those of a sidecar of the family `kronecker`.
    """
    for weight, parts in factored_weights(tensors).items():
        if INPUT_FACTOR not in parts:
            yield f"{shown(weight)}: has {' and '.join(parts)} but no {INPUT_FACTOR}; expected factors to be complete"
            continue
        if EIGENVALUES in parts and OUTPUT_FACTOR not in parts:
            yield f"{shown(weight)}: has {EIGENVALUES} but no {OUTPUT_FACTOR}; expected the bases of both sides"
            continue
        shapes = {part: tensors[f"{weight}.{part}"].shape for part in parts}
        sides = {part: shape[1:] for part, shape in shapes.items() if len(shape) == 3 and shape[0]}
        if len(sides) < len(shapes) or len({shape[0] for shape in shapes.values()}) > 1:
            yield f"{shown(weight)}: {_listed(shapes)}; expected three sizes each, the first the number of terms"
        elif any(sides[part][0] != sides[part][1] for part in parts if part != EIGENVALUES):
            yield f"{shown(weight)}: {_listed(shapes)}; expected square factors"
        elif EIGENVALUES in parts and sides[EIGENVALUES] != (sides[OUTPUT_FACTOR][0], sides[INPUT_FACTOR][0]):
            yield f"{shown(weight)}: {_listed(shapes)}; expected eigenvalues of shape (terms, out, in)"


def shape_faults(
    tensors: Mapping[str, TensorInfo], described: Mapping[str, tuple[int, ...]], *, oriented: bool
) -> Iterator[str]:
    """Factors that do not fit the weights they name.

    Args:
        tensors: those of a sidecar of the family `kronecker`, whose layout is sound.
        described: shapes of the weights by name; others are left to those who compare names.
        oriented: whether every shape is (out, in); if not, a weight may be stored transposed.
    """
    for weight, parts in factored_weights(tensors).items():
        shape = described.get(weight)
        if shape is None:
            continue
        shapes = {part: tensors[f"{weight}.{part}"].shape for part in parts}
        inward = shapes[INPUT_FACTOR][1]
        outward = shapes[OUTPUT_FACTOR][1] if OUTPUT_FACTOR in shapes else None
        if not any(_fits(inward, outward, sides) for sides in (shape, *(() if oriented else (shape[::-1],)))):
            stored = "(out, in)" if oriented else "(out, in) or (in, out)"
            yield f"{shown(weight)}: {_listed(shapes)}; expected the sides of a weight {shape}, which is {stored}"


def check_factor(name: str, part: str, values: torch.Tensor, *, basis: bool) -> None:
    """Refuses values that no factor has. That a factor is positive semidefinite is not proved, only its diagonal is.

    Args:
        name: of the tensor, as messages call it.
        part: which one of `PARTS`.
        values: the tensor.
        basis: whether it is a basis, because there are eigenvalues.

    Raises:
        NonFiniteError: NaN or infinity.
        NonPositivePrecisionError: negative eigenvalues, or a negative diagonal.
        NumericalError: a factor that is not symmetric.
    """
    where = f"precision: {shown(name)}"
    bad = int((~values.isfinite()).sum())
    if bad:
        raise NonFiniteError(f"{where}: {bad} of {values.numel()} entries are not finite")
    if basis and part != EIGENVALUES:
        return
    signed = values if part == EIGENVALUES else values.diagonal(dim1=-2, dim2=-1)
    bad = int((signed < 0).sum())
    if bad:
        which = "eigenvalues" if part == EIGENVALUES else "entries of the diagonal"
        seen = f"{where}: {bad} of {signed.numel()} {which} are negative; the smallest is {float(signed.min())}"
        raise NonPositivePrecisionError(f"{seen}; expected a positive semidefinite curvature")
    if part != EIGENVALUES and values.numel():
        gap, largest = float((values - values.mT).abs().max()), float(values.abs().max())
        if gap > _ROUNDING * largest:
            seen = f"{where}: entries differ from those across the diagonal by up to {gap:.3g} of {largest:.3g}"
            raise NumericalError(f"{seen}; expected a symmetric factor")


def _fits(inward: int, outward: int | None, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and inward == shape[1] and outward in (None, shape[0])


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{part} has shape {shape}" for part, shape in shapes.items())
