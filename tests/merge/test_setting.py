"""Weights, priors, scales and dtypes: what a recipe and its sidecars amount to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_bayes.errors import MergekitBayesError
from mergekit_bayes.merge.run import merge
from tests.merge.builders import (
    random_tensors,
    read_metadata,
    read_precisions,
    read_tensors,
    tensor_infos,
    write_checkpoint,
    write_precisions,
)
from tests.merge.dense_problem import SHAPES, WEIGHTS, Problem, check_output, everywhere, truth, write_problem
from tests.merge.truth import mismatch

PRIOR_METHODS = ("gradient_matching", "posterior")


def exchanged(
    problem: Problem, prior: Mapping[str, Tensor] | float, *, mean_scale: bool = False
) -> list[dict[str, Tensor]]:
    """S_0 + H_t, with H_t = S_t - S_0t the curvature of the source's own loss, per training unit for the mean scale."""
    shared = dict.fromkeys(SHAPES, prior) if isinstance(prior, float) else prior
    found = []
    for precision, share, count in zip(problem.precisions, problem.shares, problem.counts, strict=True):
        curvature = {name: (own.double() - share) / (count if mean_scale else 1) for name, own in precision.items()}
        found.append({name: own + shared[name] for name, own in curvature.items()})
    return found


@pytest.mark.parametrize("method", PRIOR_METHODS)
@pytest.mark.parametrize("prior", [0.5, 2.0, 0.01])
def test_every_source_gets_the_prior_of_the_recipe_in_place_of_its_own(
    method: str, prior: float, tmp_path: Path
) -> None:
    problem = write_problem(tmp_path, shares=(0.5, 1.0, 0.25))
    report = problem.merge(problem.recipe(method, precision={"prior": prior})).report
    own = exchanged(problem, prior)
    wanted = truth(problem, method, everywhere(WEIGHTS), prior=prior, precisions=own)
    check_output(tmp_path / "out", wanted)
    assert read_metadata(tmp_path / "out").prior_precision == prior
    gaps = [mismatch(wanted[name].mean, problem.sources[0][name], own[0][name], prior) for name in SHAPES]
    assert report["mismatch"][problem.label(0)]["total"] == pytest.approx(sum(gaps), rel=1e-5)


@pytest.mark.parametrize("method", PRIOR_METHODS)
@pytest.mark.parametrize("shares", [(0.0, 0.0, 0.0), (0.5, 1.0, 0.25)], ids=["no shares", "scalar shares"])
def test_a_sidecar_of_the_base_is_the_prior(method: str, shares: tuple[float, ...], tmp_path: Path) -> None:
    problem = write_problem(tmp_path, shares=shares, base_sidecar=True)
    problem.merge(problem.recipe(method))
    prior = problem.base_precision
    assert prior is not None
    # a sidecar that records no scalar share was trained with the base's own precision as its prior
    own = exchanged(problem, prior) if any(shares) else problem.precisions
    wanted = truth(problem, method, everywhere(WEIGHTS), prior=prior, precisions=own)
    check_output(tmp_path / "out", wanted)
    assert read_metadata(tmp_path / "out").prior_precision is None


@pytest.mark.parametrize("method", PRIOR_METHODS)
def test_a_number_in_the_recipe_wins_over_the_sidecar_of_the_base(method: str, tmp_path: Path) -> None:
    problem = write_problem(tmp_path, base_sidecar=True)
    problem.merge(problem.recipe(method, precision={"prior": 0.5}))
    check_output(tmp_path / "out", truth(problem, method, everywhere(WEIGHTS), prior=0.5))


@pytest.mark.parametrize("method", PRIOR_METHODS)
def test_the_prior_may_be_a_file_elsewhere(method: str, tmp_path: Path) -> None:
    problem = write_problem(tmp_path)
    prior = {name: torch.full(shape, 0.5) for name, shape in SHAPES.items()}
    file = tmp_path / "prior.safetensors"
    write_precisions(tmp_path / "base", prior, to=file)
    problem.merge(problem.recipe(method, precision={"prior": str(file)}))
    check_output(tmp_path / "out", truth(problem, method, everywhere(WEIGHTS), prior=0.5))


@pytest.mark.parametrize("method", PRIOR_METHODS)
def test_scale_mean_divides_by_the_training_units_and_writes_data_scale_again(method: str, tmp_path: Path) -> None:
    problem = write_problem(tmp_path, shares=(0.5, 1.0, 0.25))
    report = problem.merge(problem.recipe(method, scale="mean", precision={"prior": 0.002})).report
    own = exchanged(problem, 0.002, mean_scale=True)
    wanted = truth(problem, method, everywhere(WEIGHTS), prior=0.002, precisions=own)
    check_output(tmp_path / "out", wanted, precision_factor=sum(problem.counts))
    metadata = read_metadata(tmp_path / "out")
    assert metadata.num_examples == sum(problem.counts)
    assert metadata.prior_precision == pytest.approx(0.002 * sum(problem.counts))
    for index, count in enumerate(problem.counts):
        gaps = [mismatch(wanted[n].mean, problem.sources[index][n], own[index][n], 0.002) for n in SHAPES]
        found = report["mismatch"][problem.label(index)]
        assert found["per_unit"] == pytest.approx(sum(gaps), rel=1e-5)
        assert found["total"] == pytest.approx(sum(gaps) * count, rel=1e-5)


def test_scale_mean_without_a_prior_divides_too(tmp_path: Path) -> None:
    problem = write_problem(tmp_path)
    problem.merge(problem.recipe("hessian_weighted", scale="mean"))
    own = [
        {name: value.double() / count for name, value in precision.items()}
        for precision, count in zip(problem.precisions, problem.counts, strict=True)
    ]
    wanted = truth(problem, "hessian_weighted", everywhere(WEIGHTS), prior=0.0, precisions=own)
    check_output(tmp_path / "out", wanted, precision_factor=sum(problem.counts))


def test_a_base_among_the_models_keeps_the_scale_of_its_own_sidecar(tmp_path: Path) -> None:
    """The base of the recipe has one sidecar; as a source it may be given another, of another number of units."""
    problem = write_problem(tmp_path, base_sidecar=True)
    other = tmp_path / "other.safetensors"
    write_precisions(tmp_path / "one", problem.precisions[0], to=other, num_examples=10)
    recipe = problem.recipe("hessian_weighted", scale="mean")
    recipe["base_model"] = str(tmp_path / "one")
    recipe["models"][0]["precision"] = str(other)
    merge(recipe, tmp_path / "out", threads=1)
    own = [
        {name: value.double() / count for name, value in precision.items()}
        for precision, count in zip(problem.precisions, (10, *problem.counts[1:]), strict=True)
    ]
    wanted = truth(problem, "hessian_weighted", everywhere(WEIGHTS), prior=0.0, precisions=own)
    check_output(tmp_path / "out", wanted, precision_factor=10 + sum(problem.counts[1:]))


def test_a_prior_centred_on_zero_is_mentioned(tmp_path: Path) -> None:
    problem = write_problem(tmp_path)
    facts = {"prior_precision": 0.5, "prior_mean": "zero"}
    write_precisions(tmp_path / "one", problem.precisions[0], **facts)
    notes = problem.merge(problem.recipe("posterior")).report["tensors"]["notes"]
    assert f"{tmp_path}/one: its prior is centred on zero; the merge takes it as centred on the base" in notes


def test_scale_mean_of_the_prior_of_the_base(tmp_path: Path) -> None:
    problem = write_problem(tmp_path, base_sidecar=True)
    problem.merge(problem.recipe("gradient_matching", scale="mean"))
    assert problem.base_precision is not None
    prior = {name: value.double() / 1000 for name, value in problem.base_precision.items()}
    own = exchanged(problem, prior, mean_scale=True)
    wanted = truth(problem, "gradient_matching", everywhere(WEIGHTS), prior=prior, precisions=own)
    check_output(tmp_path / "out", wanted, precision_factor=sum(problem.counts))


def test_scale_mean_needs_the_number_of_training_units(tmp_path: Path) -> None:
    problem = write_problem(tmp_path)
    write_precisions(tmp_path / "one", problem.precisions[0], prior_precision=0.5)
    with pytest.raises(MergekitBayesError, match=r"one/precision.safetensors: num_examples is not recorded"):
        problem.merge(problem.recipe("gradient_matching", scale="mean"))


def test_a_source_without_sidecar_has_the_precision_of_the_prior_in_posterior(tmp_path: Path) -> None:
    problem = write_problem(tmp_path)
    recipe = problem.recipe("posterior")
    recipe["models"][1]["precision"] = False
    result = problem.merge(recipe)
    flat: dict[str, Tensor | float] = dict.fromkeys(SHAPES, 0.5)
    wanted = truth(
        problem,
        "posterior",
        everywhere(WEIGHTS),
        prior=0.5,
        precisions=[problem.precisions[0], flat, problem.precisions[2]],
    )
    check_output(tmp_path / "out", wanted)
    assert any("two: no precision of its own for 9 tensors" in note for note in result.report["tensors"]["notes"])


@pytest.mark.parametrize("method", ["gradient_matching", "hessian_weighted", "posterior"])
def test_a_number_is_an_isotropic_precision(method: str, tmp_path: Path) -> None:
    problem = write_problem(tmp_path)
    recipe = problem.recipe(method)
    recipe["models"][0]["precision"] = 3.5
    problem.merge(recipe)
    flat: dict[str, Tensor | float] = dict.fromkeys(SHAPES, 3.5)
    wanted = truth(problem, method, everywhere(WEIGHTS), prior=0.5, precisions=[flat, *problem.precisions[1:]])
    check_output(tmp_path / "out", wanted)


def test_numbers_alone_make_an_isotropic_merge_with_a_sidecar(tmp_path: Path) -> None:
    problem = write_problem(tmp_path)
    recipe = problem.recipe("gradient_matching", precision={"prior": 1.0})
    for model, precision in zip(recipe["models"], (2.0, 3.0, 5.0), strict=True):
        model["precision"] = precision
    problem.merge(recipe)
    flat = [dict.fromkeys(SHAPES, precision) for precision in (2.0, 3.0, 5.0)]
    wanted = truth(problem, "gradient_matching", everywhere(WEIGHTS), prior=1.0, precisions=flat)
    check_output(tmp_path / "out", wanted)


def test_tensors_that_a_sidecar_leaves_out_have_the_prior(tmp_path: Path) -> None:
    problem = write_problem(tmp_path)
    part = {name: value for name, value in problem.precisions[0].items() if "norm" not in name}
    write_precisions(tmp_path / "one", part, base=tmp_path / "base", prior_precision=0.5, num_examples=100)
    result = problem.merge(problem.recipe("gradient_matching"))
    own = {name: part.get(name, torch.full(shape, 0.5)) for name, shape in SHAPES.items()}
    wanted = truth(
        problem, "gradient_matching", everywhere(WEIGHTS), prior=0.5, precisions=[own, *problem.precisions[1:]]
    )
    check_output(tmp_path / "out", wanted)
    assert any("one: no precision of its own for 3 tensors" in note for note in result.report["tensors"]["notes"])


def test_priors_that_agree_need_not_be_repeated_in_the_recipe(tmp_path: Path) -> None:
    problem = write_problem(tmp_path, shares=(0.5, 0.5, 0.25))
    with pytest.raises(MergekitBayesError, match=r"precision\.prior.*one: 0\.5.*three: 0\.25.*expected a number"):
        problem.merge(problem.recipe("gradient_matching"))
    assert not (tmp_path / "out").exists()
    problem.merge(problem.recipe("gradient_matching", precision={"prior": 0.5}))


@pytest.mark.parametrize(
    ("asked", "written"),
    [
        ({}, torch.float32),
        ({"dtype": "bfloat16"}, torch.bfloat16),
        ({"out_dtype": "float16"}, torch.float16),
        ({"dtype": "float64", "out_dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "bfloat16", "out_dtype": "float32"}, torch.float32),
    ],
)
def test_out_dtype_wins_over_dtype_and_dtype_over_the_files(
    asked: dict[str, str], written: torch.dtype, tmp_path: Path
) -> None:
    problem = write_problem(tmp_path)
    problem.merge(problem.recipe("task_arithmetic", **asked))
    wanted = truth(problem, "task_arithmetic", everywhere(WEIGHTS), prior=1.0)
    compute = torch.float64 if "float64" in asked.values() else torch.float32
    check_output(tmp_path / "out", wanted, dtype=written, precision_dtype=None, compute=compute)


# --- conjugate problems: what Bayes' rule itself says ---------------------------------------------------------------

FEATURES = {"layers.0.weight": (5, 4), "layers.1.weight": (3,), "bias": ()}
PRIOR = 0.75


def regression(parts: int, root: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int]]:
    """Write the posteriors of a linear regression for `parts` pieces of its data; return that of all data.

    Every observation y = x w + noise of variance 1 looks at one weight, so that the posterior is diagonal: the prior
    N(w_0, 1 / PRIOR) becomes precision PRIOR + sum x^2 and mean w_0 + (sum x (y - x w_0)) / precision.
    """
    generator = torch.Generator().manual_seed(0)
    base = random_tensors(7, FEATURES, dtype=torch.float64)
    write_checkpoint(root / "base", base)
    counts = [40 + 30 * part for part in range(parts)]
    total = {name: (torch.zeros(shape).double(), torch.zeros(shape).double()) for name, shape in FEATURES.items()}
    for part, count in enumerate(counts):
        means, precisions = {}, {}
        for name, shape in FEATURES.items():
            x = torch.randn((count, *shape), generator=generator, dtype=torch.float64)
            y = 1.5 * x + torch.randn((count, *shape), generator=generator, dtype=torch.float64)
            information, pull = (x * x).sum(0), (x * (y - x * base[name])).sum(0)
            precisions[name] = PRIOR + information
            means[name] = base[name] + pull / precisions[name]
            total[name] = (total[name][0] + information, total[name][1] + pull)
        folder = write_checkpoint(root / f"part{part}", means)
        # one unit of data is one observation of every weight
        write_precisions(folder, precisions, base=root / "base", prior_precision=PRIOR, num_examples=count)
    whole_precision = {name: PRIOR + information for name, (information, _) in total.items()}
    whole_mean = {name: base[name] + pull / whole_precision[name] for name, (_, pull) in total.items()}
    return whole_mean, whole_precision, counts


def regression_recipe(root: Path, method: str, names: list[str], weights: list[float], **extra: Any) -> dict[str, Any]:
    models = [{"model": str(root / n), "parameters": {"weight": w}} for n, w in zip(names, weights, strict=True)]
    base = str(root / "base")
    return {"merge_method": method, "base_model": base, "models": models, "dtype": "float64", **extra}


def assert_posterior(folder: Path, mean: Mapping[str, Tensor], precision: Mapping[str, Tensor], within: float) -> None:
    means, precisions = read_tensors(folder), read_precisions(folder)
    for name in FEATURES:
        torch.testing.assert_close(means[name], mean[name], rtol=within, atol=within)
        # sidecars are written in float32
        torch.testing.assert_close(precisions[name].double(), precision[name].double(), rtol=max(within, 1e-7), atol=0)


@pytest.mark.parametrize("method", PRIOR_METHODS)
@pytest.mark.parametrize("parts", [2, 3])
def test_posteriors_of_the_parts_merge_to_the_posterior_of_the_whole(method: str, parts: int, tmp_path: Path) -> None:
    mean, precision, _ = regression(parts, tmp_path)
    names = [f"part{part}" for part in range(parts)]
    merge(regression_recipe(tmp_path, method, names, [1.0] * parts), tmp_path / "out")
    assert_posterior(tmp_path / "out", mean, precision, within=1e-10)


@pytest.mark.parametrize("method", PRIOR_METHODS)
def test_shares_of_the_data_as_weights_at_mean_scale_give_the_precision_of_the_whole(
    method: str, tmp_path: Path
) -> None:
    _, precision, counts = regression(2, tmp_path)
    total = sum(counts)
    weights = [count / total for count in counts]
    prior = {"prior": PRIOR / total}
    merge(
        regression_recipe(tmp_path, method, ["part0", "part1"], weights, scale="mean", precision=prior),
        tmp_path / "out",
    )
    for name, merged in read_precisions(tmp_path / "out").items():
        torch.testing.assert_close(merged.double(), precision[name], rtol=1e-7, atol=0)


def test_shares_of_the_data_at_mean_scale_are_weights_of_one_at_data_scale(tmp_path: Path) -> None:
    _, _, counts = regression(2, tmp_path)
    weights = [count / sum(counts) for count in counts]
    recipes = {
        "sum": regression_recipe(tmp_path, "hessian_weighted", ["part0", "part1"], [1.0, 1.0]),
        "mean": regression_recipe(tmp_path, "hessian_weighted", ["part0", "part1"], weights, scale="mean"),
    }
    for scale, recipe in recipes.items():
        merge(recipe, tmp_path / scale)
    mean, precision = read_tensors(tmp_path / "sum"), read_precisions(tmp_path / "sum")
    assert_posterior(tmp_path / "mean", mean, precision, within=1e-12)


def test_a_merge_can_be_merged_further(tmp_path: Path) -> None:
    mean, precision, _ = regression(3, tmp_path)
    merge(regression_recipe(tmp_path, "gradient_matching", ["part0", "part1"], [1.0, 1.0]), tmp_path / "two")
    merge(regression_recipe(tmp_path, "gradient_matching", ["two", "part2"], [1.0, 1.0]), tmp_path / "out")
    # the sidecar of the first merge is float32
    assert_posterior(tmp_path / "out", mean, precision, within=1e-6)


def test_a_part_can_be_taken_out_again(tmp_path: Path) -> None:
    regression(2, tmp_path)
    merge(regression_recipe(tmp_path, "posterior", ["part0", "part1"], [1.0, 1.0]), tmp_path / "both")
    merge(regression_recipe(tmp_path, "posterior", ["both", "part1"], [1.0, -1.0]), tmp_path / "out")
    part0 = read_tensors(tmp_path / "part0"), read_precisions(tmp_path / "part0")
    assert_posterior(tmp_path / "out", *part0, within=1e-5)
    assert tensor_infos(tmp_path / "out").keys() == tensor_infos(tmp_path / "base").keys()
