"""Several models of one task: what a method that knows mixtures is given, and what all others say."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mergekit_bayes.errors import PlanError
from mergekit_bayes.merge import registry
from mergekit_bayes.merge.load import load_recipe
from mergekit_bayes.merge.plan import plan_merge
from mergekit_bayes.merge.plan_text import plan_text
from mergekit_bayes.merge.registry import Merge, Parameter, merge_method, methods
from mergekit_bayes.merge.run import merge
from mergekit_bayes.posterior import Mixture, Posterior
from tests.merge.builders import (
    factor_names,
    random_precisions,
    random_tensors,
    read_tensors,
    write_adapter,
    write_checkpoint,
    write_precisions,
)

SHAPES = {"layers.0.norm.weight": (4,), "layers.0.up.weight": (3, 4), "layers.1.up.weight": (3, 4)}
NAMES = ("one", "two", "three")


class Seen(NamedTuple):
    sources: list[Posterior]
    weights: list[float]
    density: Any


SEEN: list[Seen] = []


def parts(
    base: Posterior, sources: Sequence[Posterior], weights: Tensor, *, floor: float | None = None, density: Any = ()
) -> Merge:
    """Keep the base, and measure every component."""
    SEEN.append(Seen(list(sources), weights.tolist(), density))
    norms = {
        f"{t}.{k}" if isinstance(source, Mixture) else str(t): float(component.mean.norm())
        for t, source in enumerate(sources)
        for k, component in enumerate(source.components if isinstance(source, Mixture) else (source,))
    }
    return Merge(base, {"norm": norms})


@pytest.fixture(autouse=True)
def parts_method(monkeypatch: pytest.MonkeyPatch) -> None:
    SEEN.clear()
    monkeypatch.setattr(registry, "_methods", {method.name: method for method in methods()})
    merge_method(
        "parts",
        base="required",
        precision="required",
        prior="required",
        paper="arXiv 0000.00000",
        scope="tensor",
        families=("isotropic", "diagonal", "kronecker", "mixture"),
        parameters=(Parameter("density", float, 1.0, per_source=True, help="none"),),
    )(parts)


@pytest.fixture
def models(tmp_path: Path) -> dict[str, dict[str, Tensor]]:
    found = {name: random_tensors(seed, SHAPES) for seed, name in enumerate(("base", *NAMES))}
    for seed, (name, tensors) in enumerate(found.items()):
        write_checkpoint(tmp_path / name, tensors)
        if name != "base":
            write_precisions(tmp_path / name, random_precisions(seed, SHAPES, above=0.5), prior_precision=0.5)
    return found


def recipe(root: Path, tasks: Sequence[str | None], weights: Sequence[Any], **extra: Any) -> dict[str, Any]:
    listed = [
        {"model": str(root / name), "parameters": {"weight": weight}, **({"task": task} if task else {})}
        for name, task, weight in zip(NAMES, tasks, weights, strict=True)
    ]
    return {"merge_method": "parts", "base_model": str(root / "base"), "models": listed, **extra}


@pytest.mark.parametrize("turned", [False, True])
def test_models_of_one_task_are_one_source(models: dict[str, dict[str, Tensor]], turned: bool, tmp_path: Path) -> None:
    content = recipe(tmp_path, ("code", None, "code"), (0.5, 0.75, 0.5))
    if turned:
        content["models"].reverse()
    result = merge(content, tmp_path / "out", threads=1)
    single, mixture = SEEN[1].sources  # sorted by task: the folder's name starts with a slash
    assert SEEN[1].weights == [0.75, 0.5]
    assert len(SEEN[1].density) == 2
    name = "layers.0.up.weight"
    assert torch.equal(single.mean, models["two"][name])
    assert isinstance(mixture, Mixture)
    pairs = zip(mixture.components, ("one", "three"), strict=True)
    assert all(torch.equal(component.mean, models[source][name]) for component, source in pairs)
    assert mixture.log_weights[0] == mixture.log_weights[1], "nobody knows which one is right"
    sizes = {str(tmp_path / source): float(models[source][name].norm()) for source in NAMES}
    assert result.report["layers"][name]["norm"] == pytest.approx(sizes)
    assert set(result.report["mismatch"]) == set(sizes), "each component's own posterior says what the merge costs it"
    assert result.report["method"]["weights"] == dict(zip(sizes, (0.5, 0.75, 0.5), strict=True))


def test_the_rule_itself_knows_tasks(models: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    """It acts entry by entry elsewhere, but shares of a mixture are those of whole tensors."""
    tasks = ("code", None, "code")
    for method in ("posterior", "mixture"):
        merge(recipe(tmp_path, tasks, (0.5, 0.75, 0.5), merge_method=method), tmp_path / method, threads=1)
    seen, wanted = (read_tensors(tmp_path / method) for method in ("posterior", "mixture"))
    assert all(torch.allclose(seen[name], wanted[name], rtol=1e-4, atol=1e-5) for name in SHAPES)


def test_a_task_of_one_is_no_mixture(models: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    merge(recipe(tmp_path, ("a", "b", None), (0.5, 0.75, 0.5)), tmp_path / "out", threads=1)
    assert [len(seen.sources) for seen in SEEN] == [3, 3, 3]
    assert not any(isinstance(source, Mixture) for seen in SEEN for source in seen.sources)


def test_a_plan_names_the_tasks(models: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    text = plan_text(plan_merge(load_recipe(recipe(tmp_path, ("code", None, "code"), (0.5, 0.75, 0.5)))))  # type: ignore[arg-type]
    assert re.search(r"^source     \S+/one  \(task code\)  \(precision: fisher, full space\)$", text, re.MULTILINE)


def test_a_task_has_one_weight(models: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    content = recipe(tmp_path, ("code", None, "code"), (0.5, 0.75, [{"filter": "norm", "value": 0.5}, {"value": 0.25}]))
    with pytest.raises(PlanError, match=r"models\[2\].parameters.weight.*0.25 for layers.0.up.weight, 0.5 in another"):
        merge(content, tmp_path / "out")


def test_other_methods_refuse_tasks(models: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    content = recipe(tmp_path, ("code", None, "code"), (0.5, 0.75, 0.5), merge_method="gradient_matching")
    with pytest.raises(PlanError) as caught:
        merge(content, tmp_path / "out")
    assert len(caught.value.problems) == 2, "one for each model that names a task"
    assert "models[0].task" in str(caught.value)
    assert re.search(r"gradient_matching does not merge several models of one task; .*: .*parts", str(caught.value))


def test_adapters_of_one_task(tmp_path: Path) -> None:
    """A layer that one of them leaves alone has the prior around a zero update there."""
    modules = ("layers.0.up", "layers.1.up")
    write_checkpoint(tmp_path / "base", random_tensors(0, SHAPES))
    for seed, name in enumerate(NAMES, start=1):
        there = modules[:1] if name == "three" else modules
        drawn = {m: random_tensors(10 * seed + i, {"a": (2, 4), "b": (3, 2)}) for i, m in enumerate(there)}
        write_adapter(tmp_path / name, {m: (d["a"], d["b"]) for m, d in drawn.items()})
        shapes = {key: d[part].shape for m, d in drawn.items() for key, part in zip(factor_names(m), "ab", strict=True)}
        write_precisions(tmp_path / name, random_precisions(seed, shapes, above=1.0))
    content = recipe(tmp_path, ("code", None, "code"), (0.5, 0.75, 0.5), space="product", precision={"prior": 0.1})
    merge(content, tmp_path / "out", threads=1)
    assert [seen.weights for seen in SEEN] == [[0.75, 0.5]] * 2
    mixture = SEEN[1].sources[1]
    assert isinstance(mixture, Mixture)
    assert mixture.components[0].mean.any()
    assert not mixture.components[1].mean.any()
