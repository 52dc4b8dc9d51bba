"""Full checkpoints merged from files to files against the float64 oracles."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from mergekit_bayes.merge.load import load_recipe
from mergekit_bayes.merge.plan import plan_merge
from mergekit_bayes.merge.registry import get_method, methods
from mergekit_bayes.merge.run import merge, run_merge
from tests.merge.builders import (
    random_precisions,
    random_tensors,
    read_json,
    read_metadata,
    read_precisions,
    read_tensors,
    write_checkpoint,
    write_precisions,
)
from tests.merge.dense_problem import (
    LAYER,
    REMOVAL,
    WEIGHTS,
    check_output,
    everywhere,
    truth,
    write_problem,
)
from tests.merge.truth import assert_one_rounding, mismatch

METHODS = tuple(method.name for method in methods() if method.scope == "element")
WITH_PRECISION = tuple(name for name in METHODS if get_method(name).precision != "unused")
WITH_PRIOR = tuple(name for name in METHODS if get_method(name).prior == "required")


def effective(method: str, weights: Sequence[float]) -> list[float]:
    """What the recipe's weights amount to: the soup divides by their sum."""
    return [weight / sum(weights) for weight in weights] if method == "linear" else list(weights)


def sidecar_dtype(method: str) -> torch.dtype | None:
    return torch.float32 if method in WITH_PRECISION else None


@pytest.mark.parametrize("method", METHODS)
def test_merge_is_the_oracle_of_its_method(method: str, tmp_path: Path) -> None:
    problem = write_problem(tmp_path)
    problem.merge(problem.recipe(method))
    wanted = truth(problem, method, everywhere(effective(method, WEIGHTS)), prior=0.5)
    check_output(tmp_path / "out", wanted, precision_dtype=sidecar_dtype(method))


@pytest.mark.parametrize("method", METHODS)
def test_negative_weights_remove_a_task(method: str, tmp_path: Path) -> None:
    problem = write_problem(tmp_path)
    problem.merge(problem.recipe(method, REMOVAL, precision={"floor": 0.75}))
    weights = effective(method, REMOVAL)
    wanted = truth(problem, method, everywhere(weights), prior=0.5, floor=0.75 if method in WITH_PRECISION else None)
    check_output(tmp_path / "out", wanted, precision_dtype=sidecar_dtype(method))


@pytest.mark.parametrize("method", METHODS)
def test_weights_may_follow_layers_and_filters(method: str, tmp_path: Path) -> None:
    problem = write_problem(tmp_path)
    filters = [{"filter": "norm", "value": 0.4}, {"filter": "mlp", "value": [0.2, 0.8]}, {"value": 1.5}]
    problem.merge(problem.recipe(method, [[0.25, 1.0, 0.5], filters, 0.7]))
    weights = {}
    for name, t in LAYER.items():
        first = 0.25 + 1.5 * t if t <= 0.5 else 1.5 - t
        second = 0.4 if "norm" in name else 0.2 + 0.6 * t if "mlp" in name else 1.5
        weights[name] = effective(method, (first, second, 0.7))
    wanted = truth(problem, method, weights, prior=0.5)
    check_output(tmp_path / "out", wanted, precision_dtype=sidecar_dtype(method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("stored", "written"),
    [
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.float64, torch.float64),
        (torch.float64, None),
        (torch.bfloat16, torch.float64),
    ],
    ids=str,
)
def test_every_dtype_is_rounded_once(
    method: str, stored: torch.dtype, written: torch.dtype | None, tmp_path: Path
) -> None:
    problem = write_problem(tmp_path, dtype=stored)
    out = {} if written is None else {"out_dtype": str(written).removeprefix("torch.")}
    problem.merge(problem.recipe(method, **out))
    wanted = truth(problem, method, everywhere(effective(method, WEIGHTS)), prior=0.5)
    compute = torch.float64 if (written or stored) == torch.float64 else torch.float32
    check_output(
        tmp_path / "out", wanted, dtype=written or stored, precision_dtype=sidecar_dtype(method), compute=compute
    )


@pytest.mark.parametrize("method", METHODS)
def test_float64_sidecars_are_used_in_full_where_float64_is_asked_for(method: str, tmp_path: Path) -> None:
    problem = write_problem(tmp_path, dtype=torch.float64, precision_dtype=torch.float64)
    problem.merge(problem.recipe(method, dtype="float64"))
    wanted = truth(problem, method, everywhere(effective(method, WEIGHTS)), prior=0.5)
    check_output(
        tmp_path / "out",
        wanted,
        dtype=torch.float64,
        precision_dtype=sidecar_dtype(method),
        compute=torch.float64,
    )


@pytest.mark.parametrize("method", WITH_PRECISION)
def test_sidecars_may_be_bfloat16_in_and_out(method: str, tmp_path: Path) -> None:
    problem = write_problem(tmp_path, precision_dtype=torch.bfloat16)
    problem.merge(problem.recipe(method, output={"precision": "bfloat16"}))
    wanted = truth(problem, method, everywhere(WEIGHTS), prior=0.5)
    check_output(tmp_path / "out", wanted, precision_dtype=torch.bfloat16)


@pytest.mark.parametrize("method", WITH_PRECISION)
def test_no_sidecar_is_written_where_none_is_wanted(method: str, tmp_path: Path) -> None:
    problem = write_problem(tmp_path)
    problem.merge(problem.recipe(method, output={"precision": False}))
    wanted = truth(problem, method, everywhere(WEIGHTS), prior=0.5)
    check_output(tmp_path / "out", wanted, precision_dtype=None)
    assert not list((tmp_path / "out").glob("precision*"))


@pytest.mark.parametrize("method", WITH_PRECISION)
def test_reported_mismatch_is_the_sum_over_entries(method: str, tmp_path: Path) -> None:
    problem = write_problem(tmp_path)
    report = problem.merge(problem.recipe(method)).report
    prior = 0.5 if method in WITH_PRIOR else 0.0
    wanted = truth(problem, method, everywhere(WEIGHTS), prior=prior)
    assert report == read_json(tmp_path / "out" / "merge_report.json")
    for index, (source, precision) in enumerate(zip(problem.sources, problem.precisions, strict=True)):
        found = report["mismatch"][problem.label(index)]
        layers = {name: mismatch(value.mean, source[name], precision[name], prior) for name, value in wanted.items()}
        assert found["by_layer"] == pytest.approx(layers, rel=1e-5)
        assert found["total"] == pytest.approx(sum(layers.values()), rel=1e-5)
        assert found["per_unit"] == pytest.approx(found["total"] / problem.counts[index])


@pytest.mark.parametrize("method", WITH_PRECISION)
def test_merged_sidecar_says_what_it_is(method: str, tmp_path: Path) -> None:
    problem = write_problem(tmp_path)
    problem.merge(problem.recipe(method))
    metadata = read_metadata(tmp_path / "out")
    assert (metadata.family, metadata.estimator) == ("diagonal", "merged")
    assert (metadata.space, metadata.scale) == ("full", "sum")
    assert metadata.num_examples == sum(problem.counts)
    assert metadata.prior_precision == (0.5 if method in WITH_PRIOR else None)
    assert metadata.prior_mean == "base"


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_sources_does_not_change_a_byte(method: str, tmp_path: Path) -> None:
    problem = write_problem(tmp_path)
    written = []
    for order in itertools.permutations(range(3)):
        recipe = problem.recipe(method)
        recipe["models"] = [recipe["models"][index] for index in order]
        out = merge(recipe, tmp_path / "".join(map(str, order)), threads=1).folder
        files = sorted(out.glob("*.safetensors"))
        written.append({file.name: file.read_bytes() for file in files} | {"report": report_without_order(out)})
    assert all(other == written[0] for other in written)


def report_without_order(folder: Path) -> bytes:
    """The report but for its list of inputs, which has the order of the recipe."""
    report = read_json(folder / "merge_report.json")
    report["inputs"].sort(key=lambda entry: entry["reference"])
    return json.dumps(report).encode()


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_tensors_of_many_blocks_are_merged_whole(kind: torch.dtype, tmp_path: Path) -> None:
    """The oracles are too slow here; the rule in NumPy's float64 is not."""
    shapes = {"wide": (300, 1001), "long": (70_000,)}
    tensors = {name: random_tensors(seed, shapes, dtype=kind) for seed, name in enumerate(("base", "one", "two"))}
    precisions = {name: random_precisions(seed, shapes, above=0.5) for seed, name in enumerate(("one", "two"))}
    for name, values in tensors.items():
        write_checkpoint(tmp_path / name, values)
        if name != "base":
            write_precisions(tmp_path / name, precisions[name], prior_precision=0.5)
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 0.75}} for name in ("one", "two")]
    recipe = {"merge_method": "posterior", "base_model": str(tmp_path / "base"), "models": models}
    plan = plan_merge(load_recipe(recipe), tmp_path / "out")
    result = run_merge(plan, threads=2, max_memory=1 << 20)
    written, sidecar = read_tensors(tmp_path / "out"), read_precisions(tmp_path / "out")
    total = 0.0
    for name in shapes:
        base, one, two = (tensors[each][name].double() for each in ("base", "one", "two"))
        first, second = (precisions[each][name].double() for each in ("one", "two"))
        precision = 0.5 + 0.75 * (first - 0.5) + 0.75 * (second - 0.5)
        mean = base + 0.75 * (first * (one - base) + second * (two - base)) / precision
        assert_one_rounding(written[name], mean, size=8.0)
        assert_one_rounding(sidecar[name], precision)
        total += float(0.5 * ((mean - one) ** 2 * (first - 0.5)).sum())
    assert result.report["mismatch"][str(tmp_path / "one")]["total"] == pytest.approx(total, rel=1e-4)
