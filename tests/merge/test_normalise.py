"""Curvatures brought to one size, and floors of single sources: off unless asked for, and said when on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mergekit_bayes.errors import PlanError, RecipeError
from mergekit_bayes.merge.run import merge
from tests.merge.builders import (
    random_precisions,
    random_tensors,
    read_precisions,
    read_tensors,
    write_adapter,
    write_checkpoint,
    write_precisions,
)
from tests.merge.test_kronecker import PRIOR, SHAPES, WEIGHTS, W, curvature, precision, recipe, solved, write_models
from tests.merge.truth import merge_tensor

NORM = "layers.0.norm.weight"
NAMES = ("one", "two")


def means_of(sidecars: list[dict[str, Tensor]], counts: tuple[int, int] = (1, 1)) -> list[float]:
    """The mean of the diagonal of H over all entries that a sidecar covers."""
    found = []
    for own, units in zip(sidecars, counts, strict=True):
        diagonals = [own[NORM].double() - PRIOR]
        diagonals += (
            [torch.from_numpy(np.diag(curvature(own, (3, 4))).copy())] if W not in own else [own[W].double() - PRIOR]
        )
        whole = torch.cat([each.reshape(-1) for each in diagonals])
        found.append(float(whole.mean()) / units)
    return found


@pytest.mark.parametrize("scale", ["sum", "mean"])
@pytest.mark.parametrize("kinds", [("diagonal", "diagonal"), ("kfac", "diagonal"), ("corrected", "gram")])
def test_curvatures_are_brought_to_one_size(kinds: tuple[str, str], scale: str, tmp_path: Path) -> None:
    models, sidecars = write_models(tmp_path, kinds)
    prior = PRIOR if scale == "sum" else 0.5
    content = recipe(
        tmp_path,
        method="kronecker",
        scale=scale,
        parameters={"shrinkage": 0.0, "tolerance": 1e-12, "max_iterations": 1000},
        precision={"prior": prior, "normalise": "trace"},
    )
    result = merge(content, tmp_path / "out", threads=2)
    counts = (100, 40) if scale == "mean" else (1, 1)
    sizes = means_of(sidecars, counts)
    divisors = [size / (sum(sizes) / 2) for size in sizes]
    known = [
        prior * np.eye(12) + (precision(own, (3, 4), PRIOR) - PRIOR * np.eye(12)) / (units * divisor)
        for own, units, divisor in zip(sidecars, counts, divisors, strict=True)
    ]
    wanted, total = solved(models["base"][W], [models[name][W] for name in NAMES], known, WEIGHTS, prior)
    torch.testing.assert_close(read_tensors(tmp_path / "out")[W], wanted, rtol=1e-5, atol=1e-5)
    units = 140.0 if scale == "mean" else 1.0
    np.testing.assert_allclose(
        precision(read_precisions(tmp_path / "out"), (3, 4), prior * units), total * units, rtol=1e-4, atol=1e-4
    )
    own = [
        (models[name][NORM], prior + (each[NORM].double() - PRIOR) / (units * divisor))
        for name, each, units, divisor in zip(NAMES, sidecars, counts, divisors, strict=True)
    ]
    truth = merge_tensor("posterior", (models["base"][NORM], prior), own, WEIGHTS)
    torch.testing.assert_close(read_tensors(tmp_path / "out")[NORM], truth.mean, rtol=1e-5, atol=1e-6)
    told = result.report["method"]["curvature_divided_by"]
    assert told == pytest.approx({f"{tmp_path}/{n}": d for n, d in zip(NAMES, divisors, strict=True)}, rel=1e-5)
    assert f"curvature of {tmp_path}/one: divided by" in result.summary()


@pytest.mark.parametrize("space", ["product", "full"])
def test_adapters_are_measured_by_their_updates(space: str, tmp_path: Path) -> None:
    """The same precisions ten times as large change nothing, where curvature is all there is."""
    shapes = {"a": (2, 4), "b": (3, 2)}
    write_checkpoint(tmp_path / "base", random_tensors(0, {W: (3, 4)}))
    for factor, out in ((1.0, "first"), (10.0, "second")):
        for seed, name in enumerate(NAMES, start=1):
            drawn = random_tensors(seed, shapes)
            write_adapter(tmp_path / name, {"layers.0.up": (drawn["a"], drawn["b"])})
            known = random_precisions(seed, shapes, above=2.0)
            # certain factors: the variance of a product of two uncertain ones would not scale with theirs
            known = {part: 1e4 * value for part, value in known.items()}
            stored = {
                f"base_model.model.layers.0.up.lora_{part.upper()}.weight": value * (factor if name == "one" else 1.0)
                for part, value in known.items()
            }
            write_precisions(tmp_path / name, stored, prior_precision=1e-4 * (factor if name == "one" else 1.0))
        content = recipe(tmp_path, method="posterior", space=space, output={"rank": 3})
        content |= {"precision": {"prior": 1e-7, "normalise": "trace"}}
        merge(content, tmp_path / out, threads=1)
    stem = "model" if space == "full" else "adapter_model"
    first, second = (read_tensors(tmp_path / out, stem) for out in ("first", "second"))
    if space == "full":
        torch.testing.assert_close(first[W], second[W], rtol=0.02, atol=0.02)
    else:
        a, b = ("base_model.model.layers.0.up.lora_A.weight", "base_model.model.layers.0.up.lora_B.weight")
        torch.testing.assert_close(first[b] @ first[a], second[b] @ second[a], rtol=0.02, atol=0.02)


def test_a_source_has_at_least_its_floor(tmp_path: Path) -> None:
    models, sidecars = write_models(tmp_path, ("diagonal", "diagonal"))
    content = recipe(tmp_path, method="gradient_matching", precision={"source_floor": 1.5})
    result = merge(content, tmp_path / "out", threads=1)
    for name in SHAPES:
        own = [(models[n][name], each[name].double().clamp(min=1.5)) for n, each in zip(NAMES, sidecars, strict=True)]
        truth = merge_tensor("posterior", (models["base"][name], PRIOR), own, WEIGHTS)
        torch.testing.assert_close(read_tensors(tmp_path / "out")[name], truth.mean, rtol=1e-6, atol=1e-6)
    assert result.report["method"]["source_floor"] == 1.5
    assert result.report["method"]["curvature_divided_by"] == {}


REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "no precisions": ({"merge_method": "task_arithmetic"}, "normalise.*task_arithmetic uses no precisions; remove it"),
    "something else": ({"precision": {"normalise": "max"}}, "normalise.*expected trace or false"),
    "true": ({"precision": {"normalise": True}}, "normalise.*expected trace or false"),
}


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_normalised(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_models(tmp_path, ("diagonal", "diagonal"))
    content = {**recipe(tmp_path, method="posterior", precision={"normalise": "trace"}), **changes}
    with pytest.raises((PlanError, RecipeError), match=message):
        merge(content, tmp_path / "out")


def test_curvature_is_what_lies_beyond_a_known_prior(tmp_path: Path) -> None:
    _, sidecars = write_models(tmp_path, ("diagonal", "diagonal"))
    write_precisions(tmp_path / "one", sidecars[0], base=tmp_path / "base")
    content = recipe(tmp_path, method="posterior", precision={"normalise": "trace", "prior": 0.5})
    with pytest.raises(PlanError, match=r"one/precision.safetensors: prior_precision is not recorded, so its"):
        merge(content, tmp_path / "out")
