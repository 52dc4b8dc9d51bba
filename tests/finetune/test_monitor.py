"""What the log says of the posterior, against the whole diagnosis, and when a sidecar is called nearly empty."""

from __future__ import annotations

import math

import pytest
import torch

from mergekit_bayes.finetune import monitor as monitor_module
from mergekit_bayes.finetune.ivon import IVON, diagnose
from mergekit_bayes.finetune.monitor import Monitor, curvature_warning


def trained(*sizes: int, steps: int = 5, **options: float) -> tuple[IVON, Monitor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(size, generator=generator)) for size in sizes]
    initial = [p.detach().clone() for p in parameters]
    optimizer = IVON(parameters, **{"lr": 0.05, "ess": 50.0, "beta2": 0.9, **options})
    monitor = Monitor(optimizer)
    for _ in range(steps):
        with optimizer.sampled_params(train=True):
            sum((p.square().sum() for p in parameters), torch.zeros(())).backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer, monitor, initial


@pytest.mark.parametrize("options", [{}, {"clip_radius": 0.5, "weight_decay": 0.2}, {"beta2": 0.99999}])
def test_small_models_are_looked_at_whole(options: dict[str, float]) -> None:
    optimizer, monitor, initial = trained(30, 50, **options)
    found, expected = monitor.measure(), diagnose(optimizer)
    for name in ("noise_to_weight", "moved", "clipped", "hess_init_share"):
        assert found[name] == pytest.approx(getattr(expected, name), rel=1e-6)
    parameters = optimizer.param_groups[0]["params"]
    way = sum(float((p.detach() - i).square().sum()) for p, i in zip(parameters, initial, strict=True))
    square = sum(float(p.detach().square().sum()) for p in parameters)
    assert found["noise_to_progress"] == pytest.approx(found["noise_to_weight"] * math.sqrt(square / way), rel=1e-5)


def test_large_ones_by_a_sample_in_which_every_weight_counts_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor_module, "_SAMPLED", 500)
    optimizer, monitor, _ = trained(20_000, 300, 3)
    found, expected = monitor.measure(), diagnose(optimizer)
    assert found["noise_to_weight"] == pytest.approx(expected.noise_to_weight, rel=0.1)
    assert found["moved"] == pytest.approx(expected.moved, abs=0.05)


def test_a_mean_that_has_not_moved_has_no_progress() -> None:
    _, monitor, _ = trained(4, lr=0.0)
    assert monitor.measure()["noise_to_progress"] == math.inf


@pytest.mark.parametrize(
    ("moved", "floored", "text"),
    [(0.05, 0.0, "5.0% of it has moved"), (0.9, 0.7, "70.0% of it is not positive"), (0.9, 0.4, None)],
)
def test_a_sidecar_without_curvature_is_named(moved: float, floored: float, text: str | None) -> None:
    found = curvature_warning(moved=moved, floored=floored)
    assert (found is None) == (text is None)
    if found is not None and text is not None:
        assert text in found
        assert "`precision` pass" in found
