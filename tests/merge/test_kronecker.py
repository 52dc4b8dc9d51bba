"""Merges of sidecars with Kronecker factors, from files to files, against dense float64 solves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergekit_bayes.errors import PlanError
from mergekit_bayes.merge import registry
from mergekit_bayes.merge.registry import merge_method, methods
from mergekit_bayes.merge.run import MergeResult, merge
from mergekit_bayes.posterior import Kronecker, Posterior, merge_kronecker, merge_posteriors
from tests.merge.builders import (
    random_precisions,
    random_tensors,
    read_metadata,
    read_precisions,
    read_tensors,
    write_adapter,
    write_checkpoint,
    write_precisions,
)
from tests.merge.truth import lora_update

W = "layers.0.up.weight"
SHAPES: Mapping[str, tuple[int, ...]] = {"layers.0.norm.weight": (4,), W: (3, 4)}
NAMES = ("one", "two")
WEIGHTS = (0.5, 0.75)
PRIOR = 0.25


def rule(base: Posterior, sources: Sequence[Posterior], weights: Tensor, *, floor: float | None = None) -> Posterior:
    """The rule for every family, solved to the last digit."""
    if not any(isinstance(source, Kronecker) for source in sources):
        return merge_posteriors(base, sources, weights, floor=floor)
    return merge_kronecker(base, sources, weights, floor=floor, tolerance=1e-12, max_iterations=1000)[0]


@pytest.fixture(autouse=True)
def rule_for_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_methods", {method.name: method for method in methods()})
    merge_method(
        "rule",
        base="required",
        precision="optional",
        prior="required",
        paper="arXiv 0000.00000",
        families=("isotropic", "diagonal", "kronecker"),
    )(rule)


def factors(seed: int, shape: tuple[int, int], kind: str, *, terms: int = 1, name: str = W) -> dict[str, Tensor]:
    """Tensors of a sidecar: positive semi-definite factors, or bases and eigenvalues."""
    rows, columns = shape
    found: dict[str, Tensor] = {}
    for part, side in (("input_factor", columns), ("output_factor", rows)):
        roots = random_tensors(seed, {part: (terms, side, side + 2)}, dtype=torch.float64)[part]
        found[f"{name}.{part}"] = roots @ roots.mT
        seed += 100
    if kind == "gram":
        del found[f"{name}.output_factor"]
    if kind == "corrected":
        found = {key: torch.linalg.eigh(value).eigenvectors for key, value in found.items()}
        found[f"{name}.eigenvalues"] = random_precisions(seed, {W: (terms, *shape)})[W].double()
    return {key: value.float().contiguous() for key, value in found.items()}


def curvature(sidecar: Mapping[str, Tensor], shape: tuple[int, int], name: str = W) -> np.ndarray:
    """The sum of Kronecker terms as one matrix, for weights written row by row."""
    rows, columns = shape
    parts = {key.removeprefix(f"{name}."): value.double().numpy() for key, value in sidecar.items() if name in key}
    total = np.zeros((rows * columns, rows * columns))
    for k in range(len(parts.get("input_factor", ()))):
        outer = parts["output_factor"][k] if "output_factor" in parts else np.eye(rows)
        product = np.kron(outer, parts["input_factor"][k])
        if "eigenvalues" in parts:
            product = product @ np.diag(parts["eigenvalues"][k].reshape(-1)) @ product.T
        total += product
    return total


def precision(sidecar: Mapping[str, Tensor], shape: tuple[int, int], prior: float, name: str = W) -> np.ndarray:
    """S as one matrix: the terms beside the prior, or beside what the sidecar has for the diagonal."""
    diagonal = sidecar[name].double().numpy().reshape(-1) if name in sidecar else np.full(np.prod(shape), prior)
    return np.diag(diagonal) + curvature(sidecar, shape, name)


def solved(
    base: Tensor, means: Sequence[Tensor], precisions: Sequence[np.ndarray], weights: Sequence[float], prior: Any
) -> tuple[Tensor, np.ndarray]:
    """M = theta_0 + S^-1 sum_t alpha_t S_t (m_t - theta_0) and S, densely."""
    start = np.diag(np.broadcast_to(np.asarray(prior, dtype=np.float64).reshape(-1), (base.numel(),)))
    total = start + sum(w * (each - start) for w, each in zip(weights, precisions, strict=True))
    pull = sum(
        w * each @ (mean.double() - base.double()).numpy().reshape(-1)
        for w, each, mean in zip(weights, precisions, means, strict=True)
    )
    mean = torch.from_numpy(np.linalg.solve(total, pull)).reshape(base.shape) + base.double()
    return mean, total


def write_models(
    root: Path, kinds: Sequence[str], *, transposed: bool = False, shares: Sequence[float] = (PRIOR, PRIOR)
) -> tuple[dict[str, dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Base and sources, and the sidecars: `kfac`, `gram`, `corrected`, `diagonal`, or `none` for this weight."""
    shape = SHAPES[W]
    models = {name: random_tensors(seed, SHAPES) for seed, name in enumerate(("base", *NAMES))}
    sidecars = []
    for seed, kind in enumerate(kinds):
        norm = random_precisions(seed, {"layers.0.norm.weight": (4,)}, above=PRIOR)
        own = {} if kind in ("none", "diagonal") else factors(seed, shape, kind, terms=seed + 1)  # type: ignore[arg-type]
        if kind == "diagonal":
            own = random_precisions(7, {W: shape}, above=PRIOR)
        sidecars.append({**norm, **own})
    for name, tensors in models.items():
        stored = {**tensors, W: tensors[W].T.contiguous()} if transposed else tensors
        write_checkpoint(root / name, stored)
    for name, kind, own, share, count in zip(NAMES, kinds, sidecars, shares, (100, 40), strict=True):
        stored = {**own, W: own[W].T.contiguous()} if transposed and W in own else own
        facts = {"family": "diagonal" if kind == "diagonal" else "kronecker", "estimator": "kfac"}
        write_precisions(
            root / name,
            stored,
            base=root / "base",
            prior_precision=share,
            num_examples=count,
            loss_unit="token",
            **facts,
        )
    return models, sidecars


def recipe(root: Path, weights: Sequence[float] = WEIGHTS, *, method: str = "rule", **extra: Any) -> dict[str, Any]:
    models = [
        {"model": str(root / name), "parameters": {"weight": weight}}
        for name, weight in zip(NAMES, weights, strict=True)
    ]
    return {"merge_method": method, "base_model": str(root / "base"), "models": models, "dtype": "float64", **extra}


KINDS = [
    ("kfac", "kfac"),
    ("gram", "gram"),
    ("corrected", "corrected"),
    ("kfac", "gram"),
    ("gram", "corrected"),
    ("kfac", "corrected"),
    ("kfac", "none"),
    ("kfac", "diagonal"),
    ("diagonal", "gram"),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kinds", KINDS)
def test_merges_equal_dense_solves(kinds: Sequence[str], transposed: bool, tmp_path: Path) -> None:
    """And the merged sidecar stands for the merged precision, to the last term."""
    models, sidecars = write_models(tmp_path, kinds, transposed=transposed)
    result = merge(recipe(tmp_path), tmp_path / "out", threads=1)
    shape: tuple[int, int] = SHAPES[W]  # type: ignore[assignment]
    known = [precision(own, shape, PRIOR) for own in sidecars]
    wanted, total = solved(models["base"][W], [models[name][W] for name in NAMES], known, WEIGHTS, PRIOR)
    seen = read_tensors(tmp_path / "out")[W]
    torch.testing.assert_close(seen.T if transposed else seen, wanted, rtol=1e-5, atol=1e-5)
    written = read_precisions(tmp_path / "out")
    if transposed and W in written:
        written[W] = written[W].T.contiguous()
    np.testing.assert_allclose(precision(written, shape, PRIOR), total, rtol=1e-5, atol=1e-5)
    metadata = read_metadata(tmp_path / "out")
    assert (metadata.family, metadata.prior_precision, metadata.num_examples) == ("kronecker", PRIOR, 140)
    for name, own in zip(NAMES, known, strict=True):
        gap = (wanted - models[name][W].double()).numpy().reshape(-1)
        cost = 0.5 * gap @ (own - PRIOR * np.eye(12)) @ gap
        assert result.report["mismatch"][f"{tmp_path}/{name}"]["by_layer"][W] == pytest.approx(cost, rel=1e-4)


def test_terms_without_output_factor_add_up_to_one(tmp_path: Path) -> None:
    write_models(tmp_path, ("gram", "gram"))
    merge(recipe(tmp_path), tmp_path / "out", threads=1)
    written = read_precisions(tmp_path / "out")
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == {
        "layers.0.norm.weight": (4,),
        f"{W}.input_factor": (1, 4, 4),
    }


@pytest.mark.parametrize("scale", ["sum", "mean"])
@pytest.mark.parametrize("prior", [PRIOR, 0.5])
def test_scales_and_priors(scale: str, prior: float, tmp_path: Path) -> None:
    """Factors hold the data alone: they are divided by the units, and the merge's prior stands beside them."""
    models, sidecars = write_models(tmp_path, ("kfac", "gram"), shares=(PRIOR, 0.125))
    merge(recipe(tmp_path, scale=scale, precision={"prior": prior}), tmp_path / "out", threads=1)
    counts, shape = ((100, 40) if scale == "mean" else (1, 1)), (3, 4)
    known = [prior * np.eye(12) + curvature(own, shape) / n for own, n in zip(sidecars, counts, strict=True)]
    wanted, total = solved(models["base"][W], [models[name][W] for name in NAMES], known, WEIGHTS, prior)
    torch.testing.assert_close(read_tensors(tmp_path / "out")[W], wanted, rtol=1e-5, atol=1e-5)
    units = 140 if scale == "mean" else 1
    written = precision(read_precisions(tmp_path / "out"), shape, prior * units)
    np.testing.assert_allclose(written, total * units, rtol=1e-5, atol=1e-4)
    assert read_metadata(tmp_path / "out").prior_precision == pytest.approx(prior * units)


def test_a_merge_can_be_merged_further(tmp_path: Path) -> None:
    """The merge of a merge with nothing else is the merge."""
    write_models(tmp_path, ("kfac", "gram"))
    merge(recipe(tmp_path), tmp_path / "first", threads=1)
    again = {**recipe(tmp_path), "models": [{"model": str(tmp_path / "first"), "parameters": {"weight": 1.0}}]}
    merge(again, tmp_path / "second", threads=1)
    first, second = (read_tensors(tmp_path / name)[W] for name in ("first", "second"))
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)
    pair = [precision(read_precisions(tmp_path / name), (3, 4), PRIOR) for name in ("first", "second")]
    np.testing.assert_allclose(pair[0], pair[1], rtol=1e-6, atol=1e-6)


def test_a_base_with_a_sidecar_of_its_own(tmp_path: Path) -> None:
    models, sidecars = write_models(tmp_path, ("kfac", "gram"), shares=(0.0, 0.0))
    own, weights = random_precisions(9, SHAPES, above=0.5), (0.5, 0.4)
    write_precisions(tmp_path / "base", own)
    merge(recipe(tmp_path, weights), tmp_path / "out", threads=1)
    prior = own[W].double().numpy()
    known = [np.diag(prior.reshape(-1)) + curvature(each, (3, 4)) for each in sidecars]
    wanted, total = solved(models["base"][W], [models[name][W] for name in NAMES], known, weights, prior)
    torch.testing.assert_close(read_tensors(tmp_path / "out")[W], wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(precision(read_precisions(tmp_path / "out"), (3, 4), 0.0), total, rtol=1e-5, atol=1e-5)


def test_removing_a_task_keeps_the_diagonal_of_what_is_left(tmp_path: Path) -> None:
    models, sidecars = write_models(tmp_path, ("kfac", "gram"))
    weights = (1.0, -0.01)
    merge(recipe(tmp_path, weights), tmp_path / "out", threads=1)
    known = [precision(own, (3, 4), PRIOR) for own in sidecars]
    wanted, total = solved(models["base"][W], [models[name][W] for name in NAMES], known, weights, PRIOR)
    torch.testing.assert_close(read_tensors(tmp_path / "out")[W], wanted, rtol=1e-4, atol=1e-4)
    written = read_precisions(tmp_path / "out")
    assert sorted(written) == sorted(SHAPES)
    np.testing.assert_allclose(written[W].double().numpy().reshape(-1), np.diag(total), rtol=1e-5)
    assert read_metadata(tmp_path / "out").family == "diagonal"


def test_no_sidecar_where_none_is_wanted(tmp_path: Path) -> None:
    write_models(tmp_path, ("kfac", "gram"))
    merge(recipe(tmp_path, output={"precision": False}), tmp_path / "out", threads=1)
    assert not (tmp_path / "out" / "precision.safetensors").exists()


def test_neither_threads_nor_shards_nor_the_order_of_sources_show(tmp_path: Path) -> None:
    write_models(tmp_path, ("kfac", "corrected"))
    merge(recipe(tmp_path), tmp_path / "first", threads=1)
    turned = recipe(tmp_path, output={"max_shard_size": 40})
    turned["models"].reverse()
    merge(turned, tmp_path / "second", threads=3)
    for read in (read_tensors, read_precisions):
        first, second = (read(tmp_path / name) for name in ("first", "second"))  # type: ignore[operator]
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


EXACT = {"shrinkage": 0.0, "tolerance": 1e-12, "max_iterations": 1000}


def shrunk(sidecar: Mapping[str, Tensor], gamma: float) -> dict[str, Tensor]:
    """Plain factors with their off-diagonal entries times 1 - gamma."""
    return {
        key: value * (1 - gamma) + gamma * torch.diag_embed(value.diagonal(dim1=1, dim2=2))
        if "factor" in key
        else value
        for key, value in sidecar.items()
    }


@pytest.mark.parametrize("gamma", [0.0, 0.3])
@pytest.mark.parametrize(("method", "kinds"), [("kronecker", ("kfac", "gram")), ("gram", ("gram", "gram"))])
def test_the_methods_for_factors(method: str, kinds: Sequence[str], gamma: float, tmp_path: Path) -> None:
    """The merged sidecar has the precision that the merge was made with, shrunk factors included."""
    models, sidecars = write_models(tmp_path, kinds)
    options = {**EXACT, "shrinkage": gamma} if method == "kronecker" else {"shrinkage": gamma}
    result = merge(recipe(tmp_path, method=method, parameters=options), tmp_path / "out", threads=1)
    known = [precision(shrunk(own, gamma), (3, 4), PRIOR) for own in sidecars]
    wanted, total = solved(models["base"][W], [models[name][W] for name in NAMES], known, WEIGHTS, PRIOR)
    torch.testing.assert_close(read_tensors(tmp_path / "out")[W], wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(precision(read_precisions(tmp_path / "out"), (3, 4), PRIOR), total, rtol=1e-5, atol=1e-5)
    if method == "kronecker":
        assert result.report["layers"][W]["residual"] <= 1e-12
        assert re.search(rf"iterations of the solver: at most \d+, in {W}", result.summary())


def test_regression_means_of_full_factors_count_outputs_alike(tmp_path: Path) -> None:
    models, sidecars = write_models(tmp_path, ("kfac", "corrected"))
    merge(recipe(tmp_path, method="regmean", parameters={"shrinkage": 0.0}), tmp_path / "out", threads=1)
    known = []
    for own in sidecars:
        block = curvature(own, (3, 4)).reshape(3, 4, 3, 4)
        inputs = sum(block[row, :, row, :] for row in range(3)) / 3
        known.append(PRIOR * np.eye(12) + np.kron(np.eye(3), inputs))
    wanted, total = solved(models["base"][W], [models[name][W] for name in NAMES], known, WEIGHTS, PRIOR)
    torch.testing.assert_close(read_tensors(tmp_path / "out")[W], wanted, rtol=1e-5, atol=1e-5)
    written = read_precisions(tmp_path / "out")
    assert f"{W}.output_factor" not in written
    np.testing.assert_allclose(precision(written, (3, 4), PRIOR), total, rtol=1e-5, atol=1e-5)


def test_a_mixture_of_models_with_factors(tmp_path: Path) -> None:
    """Two posteriors of one task: their shares sum to one, and the merge is the rule with them as weights."""
    models, sidecars = write_models(tmp_path, ("kfac", "kfac"))
    content = recipe(tmp_path, (0.75, 0.75), method="mixture", parameters={"tolerance": 0.0, "max_iterations": 200})
    for model in content["models"]:
        model["task"] = "code"
    result = merge(content, tmp_path / "out", threads=1)
    shares = result.report["layers"][W]["responsibilities"]
    assert sum(shares.values()) == pytest.approx(1.0)
    weights = [0.75 * shares[f"{tmp_path}/{name}"] for name in NAMES]
    known = [precision(own, (3, 4), PRIOR) for own in sidecars]
    wanted, total = solved(models["base"][W], [models[name][W] for name in NAMES], known, weights, PRIOR)
    torch.testing.assert_close(read_tensors(tmp_path / "out")[W], wanted, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(precision(read_precisions(tmp_path / "out"), (3, 4), PRIOR), total, rtol=1e-3, atol=1e-3)
    assert "in its task: " in result.summary()


# --- adapters ---------------------------------------------------------------------------------------------------------


M = "layers.0.up"


def write_adapters(root: Path, kinds: Sequence[str], *, transposed: bool = False) -> tuple[list[Tensor], list[Any]]:
    """Two adapters of rank 2 with sidecars of their updates; dW as (out, in), and the sidecars' tensors."""
    shape = (3, 4)
    weight = random_tensors(0, {W: shape[::-1] if transposed else shape})
    write_checkpoint(root / "base", weight)
    means, sidecars = [], []
    for seed, (name, kind) in enumerate(zip(NAMES, kinds, strict=True), start=1):
        drawn = random_tensors(seed, {"a": (2, 4), "b": (3, 2)})
        write_adapter(root / name, {M: (drawn["a"], drawn["b"])}, alpha=1.0, fan_in_fan_out=transposed)
        own = random_precisions(seed, {W: shape}, above=PRIOR) if kind == "diagonal" else factors(seed, shape, kind)
        facts = {"family": "diagonal" if kind == "diagonal" else "kronecker", "space": "product"}
        write_precisions(root / name, own, prior_precision=PRIOR, num_examples=10, adapter_scaling=0.5, **facts)
        means.append(lora_update(drawn["a"], drawn["b"], 0.5))
        sidecars.append(own)
    return means, sidecars


ADAPTER_KINDS = [("kfac", "kfac"), ("gram", "gram"), ("diagonal", "diagonal"), ("diagonal", "corrected")]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("space", ["product", "full"])
@pytest.mark.parametrize("kinds", ADAPTER_KINDS)
def test_sidecars_of_updates(kinds: Sequence[str], space: str, transposed: bool, tmp_path: Path) -> None:
    means, sidecars = write_adapters(tmp_path, kinds, transposed=transposed)
    merge(recipe(tmp_path, space=space, output={"rank": 3}), tmp_path / "out", threads=1)
    known = [precision(own, (3, 4), PRIOR) for own in sidecars]
    zero = torch.zeros(3, 4, dtype=torch.float64)
    wanted, total = solved(zero, means, known, WEIGHTS, PRIOR)
    if space == "full":
        seen = read_tensors(tmp_path / "out")[W] - read_tensors(tmp_path / "base")[W].double()
        seen = seen.T if transposed else seen
    else:
        tensors = read_tensors(tmp_path / "out", "adapter_model")
        seen = tensors[f"base_model.model.{M}.lora_B.weight"] @ tensors[f"base_model.model.{M}.lora_A.weight"]
    torch.testing.assert_close(seen, wanted, rtol=1e-5, atol=1e-5)
    written, metadata = read_precisions(tmp_path / "out"), read_metadata(tmp_path / "out")
    if space == "full" and transposed and W in written:
        written[W] = written[W].T.contiguous()
    np.testing.assert_allclose(precision(written, (3, 4), PRIOR), total, rtol=1e-5, atol=1e-5)
    assert metadata.space == space
    assert metadata.prior_precision == PRIOR
    assert metadata.family == ("diagonal" if set(kinds) == {"diagonal"} else "kronecker")


def test_a_merged_adapter_can_be_merged_further(tmp_path: Path) -> None:
    write_adapters(tmp_path, ("kfac", "gram"))
    content = recipe(tmp_path, space="product", output={"rank": 3})
    merge(content, tmp_path / "first", threads=1)
    content["models"] = [{"model": str(tmp_path / "first"), "parameters": {"weight": 1.0}}]
    result: MergeResult = merge(content, tmp_path / "second", threads=1)
    assert result.report["layers"][M]["lost_energy"] < 1e-12
    pair = [precision(read_precisions(tmp_path / name), (3, 4), PRIOR) for name in ("first", "second")]
    np.testing.assert_allclose(pair[0], pair[1], rtol=1e-6, atol=1e-6)


def test_precisions_of_factors_and_of_updates_meet_as_updates(tmp_path: Path) -> None:
    write_adapters(tmp_path, ("kfac", "kfac"))
    shapes = {name: tensor.shape for name, tensor in read_tensors(tmp_path / "two", "adapter_model").items()}
    write_precisions(tmp_path / "two", random_precisions(3, shapes, above=1.0))
    merge(recipe(tmp_path, space="product", precision={"prior": PRIOR}), tmp_path / "out", threads=1)
    assert sorted(read_precisions(tmp_path / "out")) == [W, f"{W}.input_factor", f"{W}.output_factor"]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_family_that_a_method_cannot_use(tmp_path: Path) -> None:
    write_models(tmp_path, ("kfac", "diagonal"))
    with pytest.raises(PlanError) as caught:
        merge(recipe(tmp_path, method="gradient_matching"), tmp_path / "out")
    assert len(caught.value.problems) == 1
    assert f"{tmp_path}/one/precision.safetensors: holds precisions of the family kronecker, which" in str(caught.value)
    assert "rule" in str(caught.value).partition("methods that can: ")[2]


def test_methods_without_precisions_do_not_mind(tmp_path: Path) -> None:
    write_models(tmp_path, ("kfac", "gram"))
    merge(recipe(tmp_path, method="task_arithmetic"), tmp_path / "out")


def test_updates_are_no_factors(tmp_path: Path) -> None:
    write_adapters(tmp_path, ("diagonal", "diagonal"))
    with pytest.raises(
        PlanError, match=r"two/precision.safetensors: describes the updates dW of an adapter, not its fa"
    ):
        merge(recipe(tmp_path, method="posterior", space="factor"), tmp_path / "out")


def test_factors_of_the_base_are_no_prior(tmp_path: Path) -> None:
    write_models(tmp_path, ("kfac", "gram"))
    write_precisions(tmp_path / "base", factors(8, (3, 4), "kfac"), family="kronecker", prior_precision=0.5)
    with pytest.raises(PlanError, match=r"base/precision.safetensors: has Kronecker factors, which no prior can have"):
        merge(recipe(tmp_path), tmp_path / "out")


def test_units_are_needed_for_the_mean(tmp_path: Path) -> None:
    write_models(tmp_path, ("kfac", "gram"))
    own = factors(8, (3, 4), "kfac")
    write_precisions(tmp_path / "one", own, family="kronecker", prior_precision=PRIOR, base=tmp_path / "base")
    with pytest.raises(PlanError, match="num_examples is not recorded"):
        merge(recipe(tmp_path, scale="mean"), tmp_path / "out")


def test_sidecars_of_different_kinds_are_told_apart(tmp_path: Path) -> None:
    write_models(tmp_path, ("kfac", "diagonal"))
    notes = merge(recipe(tmp_path), tmp_path / "out").report["tensors"]["notes"]
    assert any("one: kfac per token, kronecker, 100 units" in note for note in notes)
