"""Merge methods are found by name, declared completely, and refuse what they cannot use."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from mergekit_bayes.errors import MethodError, UnknownMethodError
from mergekit_bayes.merge import methods as methods_package
from mergekit_bayes.merge import registry
from mergekit_bayes.merge.registry import (
    Merge,
    MergeMethod,
    Parameter,
    get_method,
    merge_method,
    method_names,
    methods,
    methods_for_family,
)
from mergekit_bayes.posterior import Posterior

NAMES = (
    "gradient_matching",
    "gram",
    "hessian_weighted",
    "iso_c",
    "iso_cts",
    "knots",
    "kronecker",
    "linear",
    "mixture",
    "posterior",
    "task_arithmetic",
    "ties",
    "tsv_m",
)


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(registry, "_methods", {method.name: method for method in methods()})


def _kernel(base: Posterior, sources: Sequence[Posterior], weights: Any, *, floor: float | None = None) -> Posterior:
    """Return the base.

    Not much of a merge.
    """
    return base


def _register(name: str = "stay", **changes: Any) -> MergeMethod:
    declared = {"base": "required", "precision": "unused", "prior": "unused", "paper": "arXiv 0000.00000"}
    assert merge_method(name, **(declared | changes))(_kernel) is _kernel
    return get_method(name)


def test_the_methods_in_sorted_order() -> None:
    assert method_names() == NAMES
    assert tuple(method.name for method in methods()) == NAMES


@pytest.mark.parametrize("seed", ["0", "1"])
def test_a_fresh_process_lists_the_same_methods_without_torch(seed: str) -> None:
    code = (
        "import sys; from mergekit_bayes.merge import registry; "
        "print(*registry.method_names()); sys.exit('torch' in sys.modules or 'pydantic' in sys.modules)"
    )
    environment = os.environ | {"PYTHONHASHSEED": seed}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, list(NAMES), "")


def test_a_declaration_arrives_as_it_was_made() -> None:
    method = _register(precision="optional", prior="required", aliases=("remain",))
    assert method.kernel is _kernel
    assert (method.base, method.precision, method.prior) == ("required", "optional", "required")
    assert (method.paper, method.aliases, method.parameters) == ("arXiv 0000.00000", ("remain",), ())
    assert method.summary == "Return the base."
    assert get_method("remain") is method
    assert method_names() == tuple(sorted((*NAMES, "stay"))), "sorted, without aliases"


def test_fisher_is_hessian_weighted() -> None:
    assert get_method("fisher") is get_method("hessian_weighted")


@pytest.mark.parametrize(
    ("name", "nearest"), [("liner", "linear"), ("task_aritmetic", "task_arithmetic"), ("fischer", "fisher")]
)
def test_a_misspelt_name_gets_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UnknownMethodError, match=rf"`{name}`; there are `gradient_.*Did you mean `{nearest}`\?$"):
        get_method(name)


def test_a_name_like_no_other_gets_the_list() -> None:
    with pytest.raises(UnknownMethodError, match=r"`xyzzy`; there are .*`task_arithmetic`, .*`\.$"):
        get_method("xyzzy")


@pytest.mark.parametrize("name", ["dare_ties", "dare_linear", "slerp", "della", "model_stock", "passthrough"])
def test_other_methods_of_mergekit_are_known_and_refused(name: str) -> None:
    with pytest.raises(UnknownMethodError, match=f"`{name}` is mergekit's and not supported here"):
        get_method(name)


@pytest.mark.parametrize(
    ("name", "aliases", "taken"),
    [("linear", (), "linear"), ("fisher", (), "fisher"), ("stay", ("posterior",), "posterior")],
)
def test_a_name_is_taken_once(name: str, aliases: tuple[str, ...], taken: str) -> None:
    with pytest.raises(MethodError, match=f"`{taken}` is registered twice: by mergekit_bayes.* and by .*_kernel"):
        _register(name, aliases=aliases)
    assert method_names() == NAMES


@pytest.mark.parametrize("name", ["", "Linear", "two words", "9lives", "dash-ed", "umläut"])
def test_a_name_is_lower_case_letters_digits_and_underscores(name: str) -> None:
    with pytest.raises(MethodError, match="use lower-case letters"):
        _register(name)
    with pytest.raises(MethodError, match="use lower-case letters"):
        _register(aliases=(name,))


def test_a_kernel_has_a_docstring() -> None:
    def silent(base: Any, sources: Any, weights: Any, *, floor: Any = None) -> Any: ...

    with pytest.raises(MethodError, match=r"`mute`: .*silent needs a docstring"):
        merge_method("mute", base="unused", precision="unused", prior="unused", paper="")(silent)


def test_a_kernel_has_the_one_signature() -> None:
    def other(base: Any, sources: Any, weights: Any, floor: Any = None) -> Any:
        """Take the floor by position."""

    with pytest.raises(MethodError, match=r"signature \(base.*a kernel takes \(base, sources, weights, \*, floor"):
        merge_method("other", base="unused", precision="unused", prior="unused", paper="")(other)


def test_weights_are_kept_without_a_weight_rule() -> None:
    assert get_method("posterior").effective_weights([1, -0.5, 0], {}) == (1.0, -0.5, 0.0)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", NAMES)
def test_weights_are_numbers(method: str, weight: float) -> None:
    with pytest.raises(MethodError, match=f"`{method}`: weight of source 1 is .*, not a number"):
        get_method(method).effective_weights((1.0, weight), {})


@pytest.mark.parametrize("method", NAMES)
def test_there_is_a_source(method: str) -> None:
    with pytest.raises(MethodError, match=f"`{method}`: there is no source"):
        get_method(method).effective_weights((), {})


@pytest.mark.parametrize("method", NAMES)
def test_unknown_parameters_are_refused(method: str) -> None:
    with pytest.raises(MethodError, match=f"`{method}` has no parameter `normalise`"):
        get_method(method).effective_weights((1.0,), {"normalise": True})


def test_parameters_reach_the_weight_rule_with_defaults_filled_in() -> None:
    seen: list[object] = []

    def spy(weights: tuple[float, ...], parameters: Any) -> tuple[float, ...]:
        seen.append(dict(parameters))
        return weights

    declared = (registry.Parameter("power", float, 2.0, help="a number"),)
    method = _register(parameters=declared, weights=spy)
    method.effective_weights((1.0,), {})
    method.effective_weights((1.0,), {"power": 3})
    assert seen == [{"power": 2.0}, {"power": 3.0}]


def _entry_points(monkeypatch: pytest.MonkeyPatch, **loaders: Any) -> None:
    found = [SimpleNamespace(name=name, value=f"{name}:kernel", load=load) for name, load in loaders.items()]
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: found if group == methods_package.ENTRY_POINTS else []
    )


def test_other_packages_add_methods_in_sorted_order(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    _entry_points(
        monkeypatch, second=lambda: loaded.append("second"), first=lambda: (loaded.append("first"), _register("extra"))
    )
    methods_package._import_entry_points()
    assert loaded == ["first", "second"]
    assert "extra" in method_names()


def test_a_broken_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _entry_points(monkeypatch, broken=lambda: importlib.import_module("no_such_module_anywhere"))
    with pytest.raises(MethodError, match=r"`broken = broken:kernel` .*ModuleNotFoundError.*no_such_module"):
        methods_package._import_entry_points()


def test_a_package_that_takes_a_name_is_told_which(monkeypatch: pytest.MonkeyPatch) -> None:
    _entry_points(monkeypatch, rival=lambda: _register("linear"))
    with pytest.raises(MethodError, match="`linear` is registered twice"):
        methods_package._import_entry_points()


def _tensor_kernel(
    base: Posterior, sources: Sequence[Posterior], weights: Any, *, floor: float | None = None, rank: int = 3
) -> Merge:
    """Return the base, whole.

    Not much of a merge.
    """
    return Merge(base, {"rank": rank})


def test_a_kernel_gets_the_declared_parameters_that_it_names() -> None:
    parameters = (Parameter("rank", int, 4, help="kept"), Parameter("normalize", bool, True, help="weights"))
    merge_method(
        "whole",
        base="required",
        precision="required",
        prior="unused",
        paper="arXiv 0000.00000",
        parameters=parameters,
        scope="tensor",
        families=("diagonal", "kronecker"),
    )(_tensor_kernel)
    method = get_method("whole")
    assert (method.scope, method.families, method.options) == ("tensor", ("diagonal", "kronecker"), ("rank",))
    assert method.kernel_options({"normalize": False}) == {"rank": 4}
    assert method.kernel_options({"rank": 2}) == {"rank": 2}
    assert "whole" in methods_for_family("kronecker")
    assert "linear" not in methods_for_family("diagonal"), "it looks at means alone"


def test_a_kernel_gets_what_sources_have_of_their_own_one_by_one() -> None:
    ties = get_method("ties")
    shared = {"density": 0.5, "lambda": 2, "int8_mask": True}
    assert ties.options == ("density", "normalize", "lambda_", "rescale")
    assert ties.kernel_options(shared) == {"density": 0.5, "normalize": True, "lambda_": 2.0, "rescale": False}
    of_sources = [{}, {"density": 0.25}, {"density": 1}]
    assert ties.kernel_options(shared, of_sources)["density"] == (0.5, 0.25, 1.0)
    assert ties.kernel_options({}, of_sources)["density"] == (1.0, 0.25, 1.0)
    with pytest.raises(MethodError, match=r"`density` is 1\.5; it must be at most 1\.0"):
        ties.kernel_options(shared, [{}, {"density": 1.5}])


def test_a_kernel_may_not_take_what_is_not_declared() -> None:
    with pytest.raises(MethodError, match=r"`undeclared`.*has the signature .*rank.*declared parameters by keyword"):
        merge_method("undeclared", base="required", precision="unused", prior="unused", paper="arXiv 0000.00000")(
            _tensor_kernel
        )
