"""One of two processes: trains on its half of every batch and writes its state. Started by the test."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn

from mergekit_bayes import IVON

HESS = {"lr": 0.05, "ess": 200.0, "hess_init": 0.5, "beta2": 0.95, "weight_decay": 1e-3}


def data(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 4, generator=generator), torch.randn(8, 2, generator=generator)


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 2)


def main(noise: str, rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    net = model()
    spare = nn.Parameter(torch.ones(3))  # gets a gradient in one process only
    optimizer = IVON([*net.parameters(), spare], **HESS, noise=noise)
    wrapped = nn.parallel.DistributedDataParallel(net) if noise == "shared" else net
    for step in range(6):
        x, y = (tensor[rank::2] for tensor in data(step))
        with optimizer.sampled_params(train=True):
            ((wrapped(x) - y) ** 2).mean().backward()
            if noise == "per_process" and rank == 1:
                (spare**2).sum().backward()
        if step == 3 and rank == 0 and noise == "per_process":
            net.bias.grad[0] = float("nan")  # both must skip
        optimizer.step()
        optimizer.zero_grad()
    tensors = [tensor for p in net.parameters() for tensor in (p.detach(), optimizer.state[p]["hess"])]
    tensors += [spare.detach(), optimizer.state[spare]["hess"], torch.tensor(optimizer.param_groups[0]["skipped"])]
    torch.save(tensors, out)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4])
