"""The optimizer against its float64 oracle and against numbers the established implementation produced."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergekit_bayes import IVON
from tests.finetune.noises import Replayed
from tests.finetune.oracle import ivon as oracle

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "ivon" / "reference.json").read_text())["cases"]
BASE = {"lr": 0.1, "ess": 100.0, "hess_init": 0.5, "beta1": 0.9, "beta2": 0.95, "weight_decay": 1e-2}


def run_quadratic(
    optimizer: IVON, parameter: torch.nn.Parameter, curvature: torch.Tensor, targets: torch.Tensor
) -> dict[str, torch.Tensor]:
    for target in targets:
        for _ in range(optimizer.mc_samples):
            with optimizer.sampled_params(train=True):
                optimizer.zero_grad()
                (0.5 * curvature * (parameter - target) ** 2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state[parameter]
    return {"mean": parameter.detach(), "momentum": state["momentum"], "hess": state["hess"]}


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"clip_radius": 0.02},
        {"debias": False},
        {"rescale_lr": False},
        {"weight_decay": 0.0},
        {"beta2": 0.99999},
        {"beta2": 1.0},
        {"beta1": 0.0},
    ],
    ids=str,
)
def test_agrees_with_the_oracle(change: dict[str, Any], samples: int) -> None:
    options: dict[str, Any] = {**BASE, **change}
    rng = np.random.default_rng(5)
    start, curvature = rng.normal(size=(7, 3)), rng.uniform(0.5, 1.5, size=(7, 3))
    targets, noise = rng.normal(size=(25, 7, 3)), rng.normal(size=(25, samples, 7, 3))
    parameter = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    optimizer = IVON([parameter], **options, mc_samples=samples)
    optimizer._generator = Replayed(torch.tensor(noise.reshape(-1, 7, 3)))
    result = run_quadratic(
        optimizer, parameter, torch.tensor(curvature).float(), torch.tensor(targets, dtype=torch.float32)
    )
    names = {"hess_init": "h0", "weight_decay": "delta", "clip_radius": "xi", "rescale_lr": "rescale"}
    expected = oracle(
        start,
        lambda theta, t: curvature * (theta - targets[t - 1]),
        noise,
        **{names.get(key, key): value for key, value in options.items()},
    )
    for value, wanted in zip(result.values(), expected, strict=True):
        np.testing.assert_allclose(value.numpy(), wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("case", sorted(GOLDEN))
def test_11_agrees_with_the_established_implementation(case: str) -> None:
    golden = GOLDEN[case]
    options = {key: math.inf if value is None else value for key, value in golden["options"].items()}
    parameter = torch.nn.Parameter(torch.tensor(golden["start"]))
    optimizer = IVON([parameter], **options)
    optimizer._generator = Replayed(torch.tensor(golden["noise"]))
    result = run_quadratic(optimizer, parameter, torch.tensor(golden["curvature"]), torch.tensor(golden["targets"]))
    for key, value in result.items():
        # the noise was recovered from float32 differences of weights: a few digits are lost there
        torch.testing.assert_close(value, torch.tensor(golden[key]), rtol=1e-3, atol=1e-4)


def test_11_agrees_with_the_established_implementation_side_by_side() -> None:
    ivon = pytest.importorskip("ivon", reason="ivon-opt is not installed (GPL: an oracle for tests only)")
    generator = torch.Generator().manual_seed(0)
    start, curvature = torch.randn(50, generator=generator), torch.rand(50, generator=generator) + 0.2
    targets = torch.randn(40, 50, generator=generator)
    theirs, noise = torch.nn.Parameter(start.clone()), []
    reference = ivon.IVON([theirs], **BASE)
    torch.manual_seed(1)
    for target in targets:
        before, hess = theirs.detach().clone(), reference.param_groups[0]["hess"].clone()
        with reference.sampled_params(train=True):
            noise.append((theirs.detach() - before) * (BASE["ess"] * (hess + BASE["weight_decay"])).sqrt())
            reference.zero_grad()
            (0.5 * curvature * (theirs - target) ** 2).sum().backward()
        reference.step()
    ours = torch.nn.Parameter(start.clone())
    optimizer = IVON([ours], **BASE)
    optimizer._generator = Replayed(noise)
    result = run_quadratic(optimizer, ours, curvature, targets)
    torch.testing.assert_close(result["mean"], theirs.detach(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(result["hess"], reference.param_groups[0]["hess"], rtol=1e-3, atol=1e-4)
