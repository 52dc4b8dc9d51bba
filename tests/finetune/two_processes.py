"""One of two processes: trains in every way that involves another and writes what came out. Started by the tests."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mergekit_bayes import IVON
from mergekit_bayes.errors import FinetuneError
from mergekit_bayes.finetune import diagnose, export_precision, starting_values
from tests.finetune.scenarios import (
    OPTIONS,
    ROWS,
    Loss,
    llama,
    llama_loss,
    network,
    network_loss,
    state_of,
    train,
    whole,
)

Outcome = dict[str, Any]


def half() -> slice:
    return slice(dist.get_rank() * ROWS // 2, (dist.get_rank() + 1) * ROWS // 2)


def shared_noise() -> Outcome:
    model = network(5, 3)
    optimizer = IVON(model.parameters(), **OPTIONS)
    train(nn.parallel.DistributedDataParallel(model), optimizer, network_loss, rows=half())
    return {"state": state_of(model, optimizer)}


def own_noise() -> Outcome:
    model = network(5, 3)
    spare = nn.Parameter(torch.ones(3))  # gets a gradient in one process only
    optimizer = IVON([*model.parameters(), spare], **OPTIONS, noise="per_process")
    for step in range(5):
        with optimizer.sampled_params(train=True):
            network_loss(model, step, half()).backward()
            if dist.get_rank() == 1:
                (spare**2).sum().backward()
        if step == 3 and dist.get_rank() == 0:
            next(model.parameters()).grad[0] = float("nan")  # type: ignore[index]  # both must skip
        optimizer.step()
        optimizer.zero_grad()
    state = [*state_of(model, optimizer), spare.detach(), optimizer.state[spare]["hess"]]
    return {"state": state, "skipped": optimizer.param_groups[0]["skipped"]}


def own_noise_averaged_before() -> Outcome:
    model = network(5, 3)
    optimizer = IVON(model.parameters(), **OPTIONS, noise="per_process")
    try:
        train(nn.parallel.DistributedDataParallel(model), optimizer, network_loss, rows=half())
    except FinetuneError as error:
        return {"error": str(error)}
    return {}


def sharded(model: nn.Module, loss: Loss, *, by_column: bool = False, samples: int = 1, **training: Any) -> Outcome:
    """Train a model in shards; also what the optimizer says of itself then."""
    optimizer = shard(model, by_column=by_column, mc_samples=samples)
    at_mean = train(model, optimizer, loss, rows=half(), **training)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kinds = {(type(p) is type(optimizer.state[p]["hess"]), p.placements) for p in trained}  # type: ignore[attr-defined]
    precisions = export_precision(optimizer, [("first", trained[0])], num_examples=10).precisions
    return {
        "state": state_of(model, optimizer),
        "at_mean": at_mean,
        "like_parameter": all(same for same, _ in kinds),
        "placements": sorted(str(placement) for _, placement in kinds),
        "skipped": optimizer.param_groups[0]["skipped"],
        "noise_to_weight": diagnose(optimizer).noise_to_weight,
        "precision": precisions["first"],
        "hess_init": starting_values(trained, units_seen=100, steps=10).hess_init,
    }


def shard(model: nn.Module, *, by_column: bool = False, **options: Any) -> IVON:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    placement = (lambda parameter: Shard(parameter.ndim - 1)) if by_column else None
    layers = [part for part in model.modules() if isinstance(part, nn.Linear) or "DecoderLayer" in type(part).__name__]
    outer = [part for part in layers if not any(part is not other and part in other.modules() for other in layers)]
    for part in outer:
        fully_shard(part, shard_placement_fn=placement)
    fully_shard(model, shard_placement_fn=placement)
    optimizer = IVON([p for p in model.parameters() if p.requires_grad], **OPTIONS, **options)
    optimizer.bind(model)
    return optimizer


def unbound() -> Outcome:
    model = network(6, 4)
    messages = []
    for change in ({}, {"noise": "per_process"}):
        optimizer = shard(model, **change) if not messages else IVON(model.parameters(), **OPTIONS, **change)  # type: ignore[arg-type]
        if not messages:
            optimizer._model = None
        else:
            optimizer.bind(model)
        try:
            optimizer.sampled_params(train=True).__enter__()
        except FinetuneError as error:
            messages.append(str(error))
    strange = IVON(network(6, 4).parameters(), **OPTIONS)
    try:
        strange.bind(model)
    except FinetuneError as error:
        messages.append(str(error))
    return {"messages": messages}


def sharded_prediction() -> Outcome:
    """Losses inside and after a context that no backward pass has followed."""
    from torch.distributed.fsdp import fully_shard

    model = network(6, 4)
    fully_shard(model)  # not layer by layer: of the outermost module alone, the gathered copy is kept
    optimizer = IVON(model.parameters(), **OPTIONS)
    optimizer.bind(model)
    found = []
    with torch.no_grad():
        for sample in (0, 1, 0):
            found.append(float(network_loss(model, 0, slice(None))))
            with optimizer.sampled_params(sample=sample):
                found.append(float(network_loss(model, 0, slice(None))))
    return {"losses": found}


def sharded_resumed(folder: Path) -> Outcome:
    """Stops after two steps, saves in shards, loads into a new model and goes on."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        get_state_dict,
        set_state_dict,
    )

    first = network(5, 3)
    optimizer = shard(first)
    train(first, optimizer, network_loss, rows=half(), steps=range(2))
    weights, state = get_state_dict(first, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / "sharded")
    # tensors on the first process only; every process has to ask
    gathered = get_optimizer_state_dict(
        first, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    means = {name: whole(parameter) for name, parameter in first.named_parameters()}

    second = network(5, 3)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    other = shard(second)
    weights, state = get_state_dict(second, other)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder / "sharded")
    set_state_dict(second, other, model_state_dict=weights, optim_state_dict=state)
    train(second, other, network_loss, rows=half(), steps=range(2, 4))
    return {"state": state_of(second, other), "gathered": gathered, "means": means}


def prepared(folder: Path) -> Outcome:
    """Accelerate: micro-batches, clipping, a checkpoint in the middle that a new model and optimizer go on from."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network(5, 3)
    wrapped, optimizer = accelerator.prepare(model, IVON(model.parameters(), **OPTIONS))
    train_prepared(accelerator, wrapped, optimizer, range(2))
    accelerator.save_state(str(folder / "prepared"))
    train_prepared(accelerator, wrapped, optimizer, range(2, 4))
    whole_run = state_of(model, IVON.of(optimizer))
    resumed = Accelerator(cpu=True, gradient_accumulation_steps=2)
    other = network(5, 3)
    wrapped, optimizer = resumed.prepare(other, IVON(other.parameters(), **{**OPTIONS, "ess": 1.0}))
    resumed.load_state(str(folder / "prepared"))
    train_prepared(resumed, wrapped, optimizer, range(2, 4))
    kind = str(accelerator.distributed_type)
    return {"state": whole_run, "resumed": state_of(other, IVON.of(optimizer)), "kind": kind}


def train_prepared(accelerator: Any, model: nn.Module, optimizer: Any, steps: range) -> None:
    middle = (half().start + half().stop) // 2
    for step in steps:
        for rows in (slice(half().start, middle), slice(middle, half().stop)):
            with accelerator.accumulate(model):
                with IVON.of(optimizer).sampled_params(train=True):
                    accelerator.backward(network_loss(model, step, rows))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()


def prepared_in_shards() -> Outcome:
    """Accelerate with FSDP 2, which puts sharded parameters in place of those the optimizer was made with."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["LlamaDecoderLayer"]
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # on CPU it would take DDP without a word; told otherwise, it shards there too
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin
    model = llama(adapter=False)
    wrapped, prepared = accelerator.prepare(model, IVON(model.parameters(), **OPTIONS))
    optimizer = IVON.of(prepared)
    optimizer.bind(wrapped)
    for step in range(4):
        with optimizer.sampled_params(train=True):
            accelerator.backward(llama_loss(wrapped, step, half()))
        accelerator.clip_grad_norm_(wrapped.parameters(), 0.5)
        prepared.step()
        prepared.zero_grad()
    return {"state": state_of(wrapped, optimizer), "sharded": hasattr(next(wrapped.parameters()), "device_mesh")}


def outcomes(folder: Path) -> dict[str, Callable[[], Outcome]]:
    return {
        "shared noise": shared_noise,
        "own noise": own_noise,
        "own noise, averaged before": own_noise_averaged_before,
        "sharded": lambda: sharded(network(5, 3), network_loss),
        "sharded, two samples": lambda: sharded(network(5, 3), network_loss, samples=2),
        "sharded by columns": lambda: sharded(network(6, 4), network_loss, by_column=True),
        "sharded, one spoiled": lambda: sharded(network(6, 4), network_loss, spoil=2 if dist.get_rank() == 1 else None),
        "sharded llama": lambda: sharded(llama(adapter=False), llama_loss),
        "sharded adapter": lambda: sharded(llama(adapter=True), llama_loss),
        "unbound": unbound,
        "prediction": sharded_prediction,
        "resumed": lambda: sharded_resumed(folder),
        "prepared": lambda: prepared(folder),
        "prepared in shards": prepared_in_shards,
    }


def main(rank: int, folder: Path) -> None:
    """Join the other process and go through all of it."""
    port = (folder / "port").read_text()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    warnings.simplefilter("ignore")  # FSDP and PEFT warn about their own insides
    found = {name: run() for name, run in outcomes(folder).items()}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
