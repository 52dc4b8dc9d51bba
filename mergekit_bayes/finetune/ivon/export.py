"""From the curvature of the mean loss to the precision of the summed loss: what a merge needs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mergekit_bayes.errors import FinetuneError
from mergekit_bayes.finetune.ivon.sharding import whole

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_bayes.finetune.ivon.optimizer import IVON

__all__ = ["Exported", "export_precision", "inflation"]


@dataclass(frozen=True)
class Exported:
    """Precisions with the fields of a sidecar's metadata that the optimizer knows.

    Attributes:
        precisions: S = N (h + weight_decay) under the name of each parameter, float32, on CPU.
        metadata: arguments for SidecarMetadata; those that differ between groups or parameters are None.
        floored: entries whose curvature was raised to the floor.
    """

    precisions: dict[str, Tensor]
    metadata: dict[str, object]
    floored: int


def export_precision(
    optimizer: IVON,
    named_parameters: Iterable[tuple[str, Tensor]],
    *,
    num_examples: int,
    debias: bool = False,
    units_per_step: float | None = None,
    relative_floor: float = 1e-3,
) -> Exported:
    """Returns the precision of every trained parameter at data scale, S = N (h + weight_decay).

    The posterior sampled in training had the precision ess (h + weight_decay): ess / N colder. With sharded parameters
    every process calls this and gets the whole.

    Args:
        optimizer: after training.
        named_parameters: names as the checkpoint or adapter has them; frozen parameters are passed over.
        num_examples: N, training units of the loss, of the kind that the mean loss averages over.
        debias: remove the share that h0 still has in h: (h - a h0) / (1 - a), with a = beta2^T after T steps.
            Entries below the floor, negative ones among them, are raised to it.
        units_per_step: of the mean gradient of a step, over all micro-batches and processes. With it, debiasing also
            divides h by its `inflation`, the share of it that comes from squared gradients.
        relative_floor: floor of the debiased h, as a share of the mean of its positive entries in a tensor.

    Raises:
        FinetuneError: a parameter without state; debiasing with beta2 = 1 or before the first step; N < 1.
    """
    if num_examples < 1:
        raise FinetuneError(f"export of precisions: num_examples is {num_examples}, expected 1 or more")
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    samples = 0 if optimizer.antithetic else optimizer.mc_samples
    precisions, used, floored = {}, [], 0
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        state, group = optimizer.state.get(parameter), groups.get(parameter)
        if not state or group is None:
            raise FinetuneError(f"export of precisions: {name} has no curvature; was it ever sampled?")
        hess = whole(state["hess"]).cpu()
        if debias:
            hess, raised = _debiased(name, hess, state["hess_init_share"], group["hess_init"], relative_floor)
            floored += raised
            if units_per_step is not None:
                hess = hess / inflation(group, units_per_step=units_per_step, samples=samples)
        precisions[name] = (hess + group["solved_weight_decay"]) * num_examples
        used.append((group, state["step"]))
    return Exported(precisions, _metadata(used, num_examples, debias), floored)


def inflation(group: Mapping[str, Any], *, units_per_step: float, samples: int = 1) -> float:
    """How many times too large the curvature of a log-likelihood settles, 1 + (1 - beta2) ess / (2 B M).

    Noise times gradient has the right mean, but its square enters h as well, which settles at
    h* = H + (1 - beta2) ess E[g^2] / (2 M) with g the mean gradient of B units and M samples averaged. Near a minimum
    of a log-likelihood the gradients of single units have the mean square H (the two forms of the Fisher information),
    so that E[g^2] = H / B: the ranking of weights is right at any ess, the scale is not, and merges need the scale.

    Args:
        group: of the optimizer: `beta2`, `ess`, `hess_approx`.
        units_per_step: B.
        samples: M; 0 for antithetic samples, in which the square of the gradient cancels.

    Returns:
        The factor, at least 1; 1 where h is estimated from squared gradients in the first place.
    """
    if group["hess_approx"] != "price" or not samples:
        return 1.0
    return 1 + (1 - float(group["beta2"])) * float(group["ess"]) / (2 * units_per_step * samples)


def _debiased(name: str, hess: Tensor, share: float, hess_init: float, relative_floor: float) -> tuple[Tensor, int]:
    if share >= 1:
        raise FinetuneError(f"export of precisions: {name} still holds its initial curvature, nothing else")
    # in float64: with beta2 close to 1 the difference of two close numbers is divided by a small one
    learned = (hess.double() - share * hess_init) / (1 - share)
    positive = learned.clamp(min=0)
    count = int((learned > 0).sum())
    if count == 0:
        raise FinetuneError(f"export of precisions: {name} has no positive curvature without its initial one")
    floor = relative_floor * float(positive.sum()) / count
    return learned.clamp(min=floor).float(), int((learned < floor).sum())


def _metadata(used: list[tuple[dict[str, object], int]], num_examples: int, debias: bool) -> dict[str, object]:
    def same(key: str) -> object:
        values = {group[key] for group, _ in used}
        return values.pop() if len(values) == 1 else None

    decay = same("solved_weight_decay")
    return {
        "family": "diagonal",
        "estimator": "ivon",
        "num_examples": num_examples,
        "ess": same("ess"),
        "weight_decay": decay,
        "prior_precision": num_examples * decay if isinstance(decay, float | int) else None,
        "prior_mean": "zero",
        "hess_init": same("hess_init"),
        "beta2": same("beta2"),
        "steps": max((count for _, count in used), default=0),
        "debiased": debias,
    }
