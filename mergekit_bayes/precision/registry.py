"""The estimators of precisions by name, and what each needs: plain data, known without loading any heavy library.

A recipe is checked against this page. `create` then loads the one estimator that is wanted.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from mergekit_bayes.errors import MethodError

if TYPE_CHECKING:
    from torch import nn

    from mergekit_bayes.precision.estimator import Estimator
    from mergekit_bayes.precision.targets import Targets

__all__ = ["ESTIMATORS", "EstimatorSpec", "Option", "create", "get_estimator"]

Family = Literal["diagonal", "kronecker"]
Space = Literal["factor", "product", "full"]
Side = Literal["input", "output"]


@dataclass(frozen=True)
class Option:
    """What a recipe may set of an estimator, besides its name.

    Attributes:
        name: key in the recipe.
        default: value without that key; its type is the type that is wanted.
        minimum: smallest legal number; None if there is none.
        summary: what it does, for people.
    """

    name: str
    default: bool | int | float
    summary: str
    minimum: float | None = None


@dataclass(frozen=True)
class EstimatorSpec:
    """One estimator as a recipe sees it.

    Attributes:
        name: as in recipes and in the metadata of a sidecar.
        summary: what it estimates, for people.
        family: of the posterior that its precisions describe.
        spaces: what it can describe: the `factor`s of an adapter, their `product` dW, or a `full` model.
        source: `data` it is shown, or the `state` of an optimizer.
        factors: the Kronecker factors it computes for a linear layer; none of a diagonal.
        labels: drawn from the `model`, taken from the `data`, or None where none matter.
        options: in the order in which they are explained.
        place: `module:class` for `create`; None for what is no class.
    """

    name: str
    summary: str
    family: Family
    spaces: tuple[Space, ...]
    source: Literal["data", "state"] = "data"
    factors: tuple[Side, ...] = ()
    labels: Literal["model", "data"] | None = None
    options: tuple[Option, ...] = ()
    place: str | None = None

    def resolve_options(self, given: Mapping[str, object]) -> dict[str, object]:
        """Checks options and fills in the defaults.

        Args:
            given: options of a recipe, without `name`.

        Returns:
            One value per option, in their order.

        Raises:
            MethodError: an option the estimator does not have, of another type or too small.
        """
        where = f"estimator `{self.name}`"
        known = [option.name for option in self.options]
        for name in given:
            if name not in known:
                there_are = f"there are {', '.join(known)}" if known else "it has none"
                raise MethodError(f"{where}: unknown option `{name}`; {there_are}{_hint(name, known)}")
        resolved: dict[str, object] = {}
        for option in self.options:
            value = given.get(option.name, option.default)
            if isinstance(option.default, float) and type(value) is int:
                value = float(value)
            if type(value) is not type(option.default):
                seen = f"{where}: option `{option.name}` is {value!r}"
                raise MethodError(f"{seen}; expected {type(option.default).__name__}, such as {option.default}")
            if option.minimum is not None and not float(value) >= option.minimum:
                raise MethodError(f"{where}: option `{option.name}` is {value}; expected at least {option.minimum:g}")
            resolved[option.name] = value
        return resolved


_EVERYWHERE: tuple[Space, ...] = ("factor", "product", "full")
_LAYERS: tuple[Space, ...] = ("product", "full")
_WIDEST = Option(
    "max_dimension",
    16384,
    "layers with more inputs or outputs get a diagonal (`kfac`) or nothing (`gram`) instead of factors",
    minimum=1,
)

ESTIMATORS: Mapping[str, EstimatorSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            EstimatorSpec(
                "adam",
                "squared gradients of batches that Adam averaged while it trained, scaled to examples",
                "diagonal",
                ("factor", "full"),
                source="state",
                labels="data",
            ),
            EstimatorSpec(
                "empirical_fisher",
                "squared gradients of examples with the labels of the data",
                "diagonal",
                _EVERYWHERE,
                labels="data",
                place="mergekit_bayes.precision.diagonal:EmpiricalFisher",
            ),
            EstimatorSpec(
                "fisher",
                "diagonal Fisher information: squared gradients of examples with labels drawn from the model",
                "diagonal",
                _EVERYWHERE,
                labels="model",
                place="mergekit_bayes.precision.diagonal:Fisher",
            ),
            EstimatorSpec(
                "ggn",
                "diagonal Gauss-Newton matrix: as `fisher`, with random vectors in place of labels, less noisy",
                "diagonal",
                _EVERYWHERE,
                labels="model",
                place="mergekit_bayes.precision.diagonal:GaussNewton",
            ),
            EstimatorSpec(
                "gram",
                "second moments of the inputs of linear layers; needs no gradients",
                "kronecker",
                _LAYERS,
                factors=("input",),
                options=(_WIDEST,),
                place="mergekit_bayes.precision.gram:Gram",
            ),
            EstimatorSpec(
                "kfac",
                "second moments of the inputs and of the output gradients of linear layers, labels from the model",
                "kronecker",
                _LAYERS,
                factors=("input", "output"),
                labels="model",
                options=(
                    Option("eigenvalues", False, "correct the eigenvalues (EK-FAC) in a second pass over the data"),
                    _WIDEST,
                ),
                place="mergekit_bayes.precision.kfac:KFAC",
            ),
        )
    }
)
"""Every estimator by name, sorted."""


def get_estimator(name: str) -> EstimatorSpec:
    """Returns what is known of an estimator.

    Raises:
        MethodError: there is none of that name; the message offers the nearest.
    """
    if name not in ESTIMATORS:
        known = ", ".join(f"`{each}`" for each in ESTIMATORS)
        raise MethodError(f"unknown estimator `{name}`; there are {known}{_hint(name, list(ESTIMATORS))}")
    return ESTIMATORS[name]


def create(
    name: str,
    model: nn.Module,
    targets: Targets,
    *,
    seed: int,
    chunk_size: int = 8,
    options: Mapping[str, object] | None = None,
) -> Estimator:
    """Builds an estimator that takes data; its arguments are those of `Estimator`.

    Raises:
        MethodError: no such estimator, an illegal option, or one that takes no data.
    """
    spec = get_estimator(name)
    if spec.place is None:
        raise MethodError(f"estimator `{name}` reads the state of an optimizer; expected one that is shown data")
    module, _, attribute = spec.place.partition(":")
    kind = getattr(importlib.import_module(module), attribute)
    resolved = spec.resolve_options(options or {})
    estimator: Estimator = kind(model, targets, seed=seed, chunk_size=chunk_size, options=resolved)
    return estimator


def _hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f". Did you mean `{near[0]}`?" if near else ""
