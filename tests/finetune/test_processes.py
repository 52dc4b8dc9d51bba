"""Two processes: shared noise equals one process, noise of their own leaves both with the same posterior."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mergekit_bayes import IVON
from tests.finetune.two_processes import HESS, data, model

ROOT = Path(__file__).parent.parent.parent


def run_two(tmp_path: Path, noise: str) -> list[list[torch.Tensor]]:
    outs = [tmp_path / f"{rank}.pt" for rank in range(2)]
    command = [sys.executable, "-m", "tests.finetune.two_processes", noise]
    running = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store"), str(out)], cwd=ROOT, stderr=subprocess.PIPE)
        for rank, out in enumerate(outs)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors.decode()
    return [torch.load(out, weights_only=True) for out in outs]


@pytest.mark.slow
def test_shared_noise_equals_one_process(tmp_path: Path) -> None:
    first, second = run_two(tmp_path, "shared")
    net = model()
    optimizer = IVON([*net.parameters(), torch.nn.Parameter(torch.ones(3))], **HESS)
    for step in range(6):
        x, y = data(step)
        with optimizer.sampled_params(train=True):
            ((net(x) - y) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = [tensor for p in net.parameters() for tensor in (p.detach(), optimizer.state[p]["hess"])]
    for one, other, alone in zip(first, second, whole, strict=False):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_noise_per_process_ends_in_one_posterior(tmp_path: Path) -> None:
    """Gradients, curvature estimates, skipped steps and unused parameters are agreed on."""
    first, second = run_two(tmp_path, "per_process")
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    *_, spare, spare_hess, skipped = first
    assert int(skipped) == 1
    assert not torch.equal(spare, torch.ones(3))
    assert not torch.equal(spare_hess, torch.full((3,), 0.5))
    shared, _ = run_two(tmp_path / _made(tmp_path), "shared")
    assert not torch.allclose(first[1], shared[1], rtol=1e-3)  # two samples, not one twice


def _made(folder: Path) -> str:
    (folder / "shared").mkdir()
    return "shared"
