"""The registry of merge methods: what a method declares, and how it is found by name.

A merge method is one function in one file of `mergekit_bayes.merge.methods` (or of any package that names it
in the entry-point group `mergekit_bayes.merge_methods`):

    @merge_method("task_arithmetic", base="required", precision="unused", prior="unused", paper="arXiv
    2212.04089") def task_arithmetic(base, sources, weights, *, floor=None): ...

The function turns posteriors into a posterior and knows no recipe, file, name or device. What the planner
must know before any tensor is read - which inputs the method needs, whether it sees blocks or whole tensors,
which families of posteriors it can use, which parameters a recipe may set, how recipe weights become effective
weights - stands in the decorator. This module imports no torch.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from mergekit_bayes.errors import MethodError, UnknownMethodError
from mergekit_bayes.merge.parameter import Parameter, resolve_parameters

if TYPE_CHECKING:
    from mergekit_bayes.posterior import Posterior

__all__ = [
    "Merge",
    "MergeKernel",
    "MergeMethod",
    "Parameter",
    "get_method",
    "merge_method",
    "method_names",
    "methods",
    "methods_for_family",
]

BaseUse = Literal["required", "unused"]
PrecisionUse = Literal["required", "unused", "optional"]
PriorUse = Literal["required", "unused"]
Scope = Literal["element", "tensor"]
WeightRule = Callable[[tuple[float, ...], Mapping[str, object]], tuple[float, ...]]

ELEMENTWISE = ("isotropic", "diagonal")
"""The families of posteriors whose precision acts entry by entry."""

NAME = re.compile(r"[a-z][a-z0-9_]*")


class Merge(NamedTuple):
    """What a method that sees whole tensors returns: the merge, and what it measured on the way.

    Attributes:
        posterior: the merged posterior.
        measures: numbers for the report under the tensor's name, such as the iterations of a solver; a mapping where
            there is one number per source position.
    """

    posterior: Posterior
    measures: Mapping[str, float | Mapping[str, float]] = MappingProxyType({})

    @classmethod
    def of(cls, result: Posterior | Merge) -> Merge:
        """What any kernel returned, in this form."""
        return result if isinstance(result, Merge) else cls(result)


MergeKernel = Callable[..., Any]
"""The function behind a merge method: `(base, sources, weights, *, floor=None, **options)`.

Posteriors of one tensor in, their merge out; `weights` has shape (sources,), and the options are the declared
parameters that the function names. It computes in the dtype of its inputs and does not change them.

With scope "element" it may be given any block of a tensor (the merge of a block is the block of the merge), returns a
`Posterior`, and uses tensor arithmetic only, so that it can be compiled; posteriors that do not act entry by entry
reach it whole, where its families allow them. With scope "tensor" it is given whole tensors in their own shape,
which may be of any number of dimensions, and returns a `Merge`; a method declared `entrywise` may be given blocks of
those whose posteriors act entry by entry.
"""

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


@dataclass(frozen=True)
class MergeMethod:
    """A registered merge method: its kernel, and everything the planner needs to know about it.

    Args:
        name: the name used in recipes.
        aliases: other names for the same method.
        kernel: the function from posteriors to a posterior.
        base: "required" if the base's mean enters the result; "unused" if the method runs without a base
            model.
        precision: "required" if every source needs a precision sidecar; "optional" if a source without one is
            taken to have the prior precision; "unused" if precisions do not enter, and none is produced.
        prior: "required" if the prior precision enters the result.
        paper: where the method comes from, e.g. "arXiv 2212.04089".
        summary: the first line of the kernel's docstring.
        parameters: what a recipe's `parameters` may set, besides `weight`.
        weight_rule: turns checked recipe weights and resolved parameters into effective weights; None keeps
            them.
        scope: "element" if the kernel merges any block of a tensor, "tensor" if it has to see all of it.
        families: the families of posteriors that it can take as sources.
        options: keywords of the kernel, the names of the parameters that are handed to it.
        inputs_only: of Kronecker factors only those of inputs count, so that the merge has one term without output
            factor.
        entrywise: with scope "tensor", whether the kernel still merges posteriors that act entry by entry one entry at
            a time, so that any block of such a tensor will do.
    """

    name: str
    kernel: MergeKernel
    base: BaseUse
    precision: PrecisionUse
    prior: PriorUse
    paper: str
    summary: str
    aliases: tuple[str, ...] = ()
    parameters: tuple[Parameter, ...] = ()
    weight_rule: WeightRule | None = field(default=None, repr=False)
    scope: Scope = "element"
    families: tuple[str, ...] = ELEMENTWISE
    options: tuple[str, ...] = ()
    inputs_only: bool = False
    entrywise: bool = False

    @property
    def in_blocks(self) -> bool:
        """Whether posteriors that act entry by entry can be merged block by block."""
        return self.scope == "element" or self.entrywise

    @property
    def needs_evidence(self) -> bool:
        """Whether precisions alone decide, so that a source without any for a tensor has no say in it."""
        return self.precision != "unused" and self.prior == "unused"

    def kernel_options(
        self, parameters: Mapping[str, object], of_sources: Sequence[Mapping[str, object]] = ()
    ) -> dict[str, object]:
        """The keyword arguments of the kernel, from checked or unchecked recipe parameters.

        Args:
            parameters: values by name, without `weight`; names may be missing.
            of_sources: for each source that the kernel is given, in order, the values it has of its own; without any,
                all sources have the shared ones.

        Returns:
            One value per option; a tuple with one value per source where the parameter is declared `per_source` and
            `of_sources` is given. A parameter whose name is a word of Python, such as `lambda`, arrives with an
            underscore behind it.

        Raises:
            MethodError: as `resolve_parameters`.
        """
        shared = self.resolve_parameters(parameters)
        own = [self.resolve_parameters({**parameters, **each}) for each in of_sources]
        varying = {parameter.name for parameter in self.parameters if parameter.per_source and own}
        return {
            option: tuple(each[name] for each in own) if name in varying else shared[name]
            for option, name in ((option, option.rstrip("_")) for option in self.options)
        }

    def resolve_parameters(self, parameters: Mapping[str, object]) -> dict[str, object]:
        """Check recipe parameters against the declaration and fill in the defaults.

        Args:
            parameters: values by name, without `weight`; names may be missing.

        Returns:
            One value per declared parameter, in declaration order.

        Raises:
            MethodError: a name the method does not have, a value of the wrong type or outside its range.
        """
        return resolve_parameters(f"merge method `{self.name}`", self.parameters, parameters)

    def effective_weights(self, weights: Sequence[float], parameters: Mapping[str, object]) -> tuple[float, ...]:
        """Turn the weights of a recipe into the weights the kernel is given.

        Args:
            weights: one finite number per source; negative ones remove a source.
            parameters: recipe parameters by name, without `weight`; missing ones take their default.

        Returns:
            One weight per source, in the same order.

        Raises:
            MethodError: no source, a weight that is not finite, an illegal parameter, or weights that the
                method cannot use (for example a zero sum that should be normalised).
        """
        checked = tuple(float(weight) for weight in weights)
        if not checked:
            raise MethodError(f"merge method `{self.name}`: there is no source; at least one is needed")
        for position, weight in enumerate(checked):
            if not math.isfinite(weight):
                raise MethodError(f"merge method `{self.name}`: weight of source {position} is {weight}, not a number")
        resolved = self.resolve_parameters(parameters)
        return checked if self.weight_rule is None else self.weight_rule(checked, resolved)


_methods: dict[str, MergeMethod] = {}


def merge_method(  # noqa: PLR0913  (a declaration, read by keyword)
    name: str,
    *,
    base: BaseUse,
    precision: PrecisionUse,
    prior: PriorUse,
    paper: str,
    aliases: tuple[str, ...] = (),
    parameters: tuple[Parameter, ...] = (),
    weights: WeightRule | None = None,
    scope: Scope = "element",
    families: tuple[str, ...] = ELEMENTWISE,
    inputs_only: bool = False,
    entrywise: bool = False,
) -> Callable[[Kernel], Kernel]:
    """Register the decorated function as the merge method `name`; the function itself is returned unchanged.

    Args:
        name: lower-case name for recipes, letters, digits and underscores.
        base: "required" or "unused": does the base's mean enter the result?
        precision: "required", "optional" or "unused": do the sources' precisions?
        prior: "required" or "unused": does the prior precision?
        paper: where the method comes from.
        aliases: other names for the same method.
        parameters: what a recipe's `parameters` may set, besides `weight`.
        weights: pure function from recipe weights and resolved parameters to effective weights.
        scope: "element" for kernels that merge any block of a tensor, "tensor" for those that see all of it.
        families: the families of posteriors that the kernel can take as sources.
        inputs_only: of Kronecker factors only those of inputs count.
        entrywise: with scope "tensor", whether posteriors that act entry by entry are still merged so.

    Raises:
        MethodError: a name that is taken or malformed, a kernel without docstring or with another signature.
    """

    def register(kernel: Kernel) -> Kernel:
        for taken in (name, *aliases):
            if not NAME.fullmatch(taken):
                raise MethodError(f"merge method name {taken!r}: use lower-case letters, digits and underscores")
        options = _check_kernel(name, kernel, parameters)
        summary = inspect.getdoc(kernel).splitlines()[0]  # type: ignore[union-attr]  # checked just above
        _add(
            MergeMethod(
                name=name,
                aliases=aliases,
                kernel=kernel,
                base=base,
                precision=precision,
                prior=prior,
                paper=paper,
                summary=summary,
                parameters=parameters,
                weight_rule=weights,
                scope=scope,
                families=families,
                options=options,
                inputs_only=inputs_only,
                entrywise=entrywise,
            )
        )
        return kernel

    return register


def get_method(name: str) -> MergeMethod:
    """Return the merge method registered under `name` or one of its aliases.

    Raises:
        UnknownMethodError: there is none; the message offers the nearest name.
    """
    _discover()
    for method in _methods.values():
        if name == method.name or name in method.aliases:
            return method
    known = ", ".join(f"`{each}`" for each in method_names())
    # Only on the way to an error: recipes bring pydantic along.
    from mergekit_bayes.recipe.mergekit_words import METHODS

    if name in METHODS:
        raise UnknownMethodError(f"merge method `{name}` is mergekit's and not supported here; there are {known}")
    names = [each for method in methods() for each in (method.name, *method.aliases)]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean `{near[0]}`?" if near else ""
    raise UnknownMethodError(f"unknown merge method `{name}`; there are {known}.{hint}")


def method_names() -> tuple[str, ...]:
    """Names of all merge methods, sorted, without aliases."""
    return tuple(method.name for method in methods())


def methods() -> tuple[MergeMethod, ...]:
    """All merge methods, sorted by name."""
    _discover()
    return tuple(_methods[name] for name in sorted(_methods))


def methods_for_family(family: str) -> tuple[str, ...]:
    """Names of the methods that use posteriors of a family, sorted; those that look at means alone are not among them.

    Args:
        family: such as `kronecker`.
    """
    return tuple(each.name for each in methods() if each.precision != "unused" and family in each.families)


def _discover() -> None:
    """Import the package of methods, whose files register themselves; only the first call does anything."""
    importlib.import_module("mergekit_bayes.merge.methods")


def _add(method: MergeMethod) -> None:
    taken = {name: each for each in _methods.values() for name in (each.name, *each.aliases)}
    for name in (method.name, *method.aliases):
        if name in taken:
            here, there = _place(method.kernel), _place(taken[name].kernel)
            raise MethodError(f"merge method `{name}` is registered twice: by {there} and by {here}; rename one")
    _methods[method.name] = method


def _check_kernel(name: str, kernel: MergeKernel, parameters: Sequence[Parameter]) -> tuple[str, ...]:
    """The names of the declared parameters that the kernel takes, once its signature is known to be one."""
    if not inspect.getdoc(kernel):
        raise MethodError(f"merge method `{name}`: {_place(kernel)} needs a docstring with its equation and paper")
    seen = [(parameter.name, parameter.kind) for parameter in inspect.signature(kernel).parameters.values()]
    positional, keyword = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    wanted = [("base", positional), ("sources", positional), ("weights", positional), ("floor", keyword)]
    options = tuple(option for option, _ in seen[len(wanted) :])
    declared = {parameter.name for parameter in parameters}
    legal = all(kind == keyword and option.rstrip("_") in declared for option, kind in seen[len(wanted) :])
    if seen[: len(wanted)] != wanted or not legal:
        raise MethodError(
            f"merge method `{name}`: {_place(kernel)} has the signature {inspect.signature(kernel)}; "
            "a kernel takes (base, sources, weights, *, floor=None), and its declared parameters by keyword"
        )
    return options


def _place(kernel: MergeKernel) -> str:
    return f"{kernel.__module__}.{getattr(kernel, '__name__', kernel)}"
