"""From the recipe's section to an optimizer."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mergekit_bayes.finetune.ivon import IVON
from mergekit_bayes.finetune.optimizers import build_optimizer, starting_point, take_course
from mergekit_bayes.recipe.finetune import AdamWSpec, IvonSpec


def parameters() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(8, 4, generator=generator)), torch.nn.Parameter(torch.zeros(4, 8))]


def first_ratio(optimizer: IVON, given: list[torch.Tensor]) -> float:
    """Noise of the first sample over the weights of the tensor that is not zero."""
    (group,) = optimizer.param_groups
    rms = float(given[0].detach().square().mean().sqrt())
    return 1 / math.sqrt(group["ess"] * (group["hess_init"] + group["weight_decay"])) / rms


@pytest.mark.parametrize(
    ("options", "derived"),
    [
        ({}, ("ess", "hess_init", "beta2")),
        ({"noise_to_weight": 0.3, "weight_decay": 0.0005}, ("ess", "hess_init", "beta2")),
        ({"ess": 5000.0}, ("hess_init", "beta2")),
        ({"hess_init": 0.5, "beta2": 0.999}, ("ess",)),
        ({"ess": 700.5, "hess_init": 0.5, "beta2": 0.9}, ()),
    ],
)
def test_what_the_recipe_leaves_open_is_derived(options: dict[str, Any], derived: tuple[str, ...]) -> None:
    spec, given = IvonSpec(**options), parameters()
    start = starting_point(spec, given, units_seen=1000, steps=50)
    assert start.derived == derived
    assert start.ess == options.get("ess", 1000 / spec.temperature)
    assert start.beta2 == pytest.approx(options.get("beta2", 0.05 ** (1 / 50)))
    if "hess_init" in options:
        assert start.hess_init == options["hess_init"]
    else:
        assert start.noise_to_weight == pytest.approx(spec.noise_to_weight)
    optimizer = build_optimizer(spec, given, start=start)
    assert isinstance(optimizer, IVON)
    assert first_ratio(optimizer, given) == pytest.approx(start.noise_to_weight, rel=1e-5)
    assert start.line().count("(derived)") == len(derived)


def test_every_option_of_ivon_arrives() -> None:
    options: dict[str, Any] = {
        "lr": 0.3, "ess": 10.0, "hess_init": 0.2, "beta1": 0.5, "beta2": 0.8, "weight_decay": 0.1, "mc_samples": 4,
        "hess_approx": "gradsq", "clip_radius": 0.7, "debias": False, "rescale_lr": True, "antithetic": True,
        "noise": "per_process",
    }  # fmt: skip
    spec = IvonSpec(**options)
    assert {name for name in IvonSpec.model_fields if name not in options} == {"name", "temperature", "noise_to_weight"}
    start = starting_point(spec, parameters(), units_seen=10, steps=5)
    optimizer = build_optimizer(spec, parameters(), start=start, seed=9, batch_units=32.0)
    (group,) = optimizer.param_groups
    for name, value in options.items():
        assert (group[name] if name in group else getattr(optimizer, name)) == value
    assert group["seed"] == 9
    assert group["batch_size"] == 32.0


def test_every_option_of_adamw_arrives() -> None:
    options: dict[str, Any] = {
        "lr": 0.3, "beta1": 0.5, "beta2": 0.8, "eps": 1e-6, "weight_decay": 0.1, "amsgrad": True,
    }  # fmt: skip
    assert {name for name in AdamWSpec.model_fields if name not in options} == {"name"}
    optimizer = build_optimizer(AdamWSpec(**options), parameters())
    (group,) = optimizer.param_groups
    assert group["fused"]
    assert group["betas"] == (0.5, 0.8)
    assert {name: group[name] for name in ("lr", "eps", "weight_decay", "amsgrad")} == {
        "lr": 0.3, "eps": 1e-6, "weight_decay": 0.1, "amsgrad": True,
    }  # fmt: skip


def test_adamw_does_without_a_fused_kernel_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    original = torch.optim.AdamW

    def without_kernel(*arguments: Any, fused: bool = False, **options: Any) -> torch.optim.AdamW:
        if fused:
            raise RuntimeError("`fused=True` requires all the params to be floating point Tensors of supported devices")
        return original(*arguments, **options)

    monkeypatch.setattr(torch.optim, "AdamW", without_kernel)
    assert not build_optimizer(AdamWSpec(), parameters()).param_groups[0]["fused"]


def test_a_new_course_changes_the_options_that_changed() -> None:
    spec = IvonSpec(ess=10.0, hess_init=1.0, weight_decay=0.5, clip_radius=None)
    start = starting_point(spec, parameters(), units_seen=10, steps=5)
    optimizer = build_optimizer(IvonSpec(ess=10.0, hess_init=1.0, clip_radius=0.1), parameters(), start=start)
    take_course(optimizer, spec, ["weight_decay", "clip_radius", "lr", "beta2"])
    (group,) = optimizer.param_groups
    assert group["weight_decay"] == 0.5
    assert group["clip_radius"] == math.inf
    assert group["beta2"] == start.beta2  # left open: it stays
    adamw = build_optimizer(AdamWSpec(), parameters())
    take_course(adamw, AdamWSpec(beta1=0.5, weight_decay=0.3), ["beta1", "weight_decay"])
    assert adamw.param_groups[0]["betas"] == (0.5, 0.999)
    assert adamw.param_groups[0]["weight_decay"] == 0.3
