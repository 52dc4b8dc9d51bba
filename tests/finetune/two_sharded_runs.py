"""Training runs in two processes with the model in shards: run by `torchrun` as `two_sharded_runs.py BASES FOLDER`.

Accelerate takes DDP on CPUs, whatever the launch asks for. Here it is told to shard after all: everything below, from
`Accelerator.prepare` to the reduction of gradients, is what it does on GPUs, over gloo.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

warnings.simplefilter("ignore")

LAUNCH = ["--num_machines=1", "--machine_rank=0", "--num_processes=2", "--main_process_port=0", "--dynamo_backend=no"]
LAUNCH += ["--mixed_precision=no", "--use_fsdp", "--fsdp_version=2", "script"]


def launched() -> dict[str, str]:
    """What `accelerate launch --use_fsdp --fsdp_version 2` tells Accelerate about sharding, by its own account."""
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    told = prepare_multi_gpu_env(launch_command_parser().parse_args(LAUNCH))
    return {name: value for name, value in told.items() if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}


def recipes(bases: Path, *, rows: int) -> dict[str, dict[str, Any]]:
    """What is run, with so many rows per process: once in two processes, once in one with twice as many."""
    from tests.finetune.runs import recipe

    # nine rows in steps of four: one process has nothing to do in the last step of an epoch
    few = {"train": "other texts", "eval": "texts"}
    base = {"per_device_train_batch_size": rows, "max_steps": 5, "max_grad_norm": 0.05}
    full = {"adapter": None, "optimizer": {"lr": 0.1}}
    llama, tied, bert = bases / "llama", bases / "llama_tied", bases / "bert"
    return {
        "lora": recipe(llama, data=few, training={**base, "gradient_accumulation_steps": 2, "save_steps": 2}),
        "full": recipe(llama, **full, training={**base, "gradient_checkpointing": True}),
        "tied": recipe(tied, **full, training=base),
        "samples": recipe(llama, optimizer={"mc_samples": 2, "hess_approx": "gradsq"}, training=base),
        "classifier": recipe(bert, task="sequence_classification", optimizer={"lr": 0.1}, training=base),
        "adamw": {
            **recipe(llama, adapter=None, training={**base, "save_steps": 2}),
            "optimizer": {"name": "adamw", "lr": 0.01},
        },
        "bfloat16": recipe(llama, model={"dtype": "bfloat16"}, training={**base, "bf16": True}),
        "bfloat16 base": recipe(llama, model={"dtype": "bfloat16"}, training=base),
    }


def shard_on_cpu() -> None:
    """Makes the trainer's accelerators those of FSDP 2, as Accelerate itself does on GPUs."""
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    from mergekit_bayes.finetune import run

    make = run.make_accelerator

    def made(*arguments: Any) -> Any:
        accelerator = make(*arguments)
        accelerator.state.distributed_type = DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        return accelerator

    run.make_accelerator = made


def stopped(content: dict[str, Any], out: Path) -> None:
    """Runs until a signal reaches one process at its third step, and then goes on."""
    from mergekit_bayes.finetune.step import Stepper
    from tests.finetune.runs import run
    from tests.say import say

    original, calls = Stepper.step, 0

    def step(self: Stepper, *arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments, **keywords)

    Stepper.step = step  # type: ignore[method-assign]
    try:
        run(content, out)
    except KeyboardInterrupt as stop:
        say(f"process {os.environ['RANK']}: {stop}")
    Stepper.step = original  # type: ignore[method-assign]
    run(content, out)


def spoiled(content: dict[str, Any], out: Path) -> None:
    """Runs with one loss that is not finite, in one process."""
    from mergekit_bayes.finetune import step as module
    from tests.finetune.runs import run

    original, calls = module.summed_loss, 0

    def summed_loss(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        spoil = calls == 2 and os.environ["RANK"] == "1"
        return original(*arguments) * (float("inf") if spoil else 1.0)

    module.summed_loss = summed_loss
    run(content, out)
    module.summed_loss = original


def main() -> None:
    from tests.finetune.runs import run

    shard_on_cpu()
    bases, folder = (Path(argument) for argument in sys.argv[1:])
    content = recipes(bases, rows=2)
    for name in content:
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = str(name != "full").lower()
        run(content[name], folder / name)
    for name in ("lora", "adamw"):
        stopped(content[name], folder / f"{name}, stopped")
    spoiled(content["samples"], folder / "spoiled")


if __name__ == "__main__":
    os.environ.update(launched(), ACCELERATE_USE_CPU="true")
    main()
