"""Whether the processes of a training know of each other, and are what was asked for.

Accelerate takes a launch it cannot use for one of a single process, and says nothing: two processes then train the same
thing side by side, or one trains where two were asked for.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from mergekit_bayes.errors import FinetuneError

_WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
_SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DEEPSPEED"}
_SCRIPT = "-m mergekit_bayes recipe.yaml OUT"


def check_launch(state: Any = None, environment: Mapping[str, str] | None = None) -> None:
    """Refuses a launch whose processes would not do together what was asked of them.

    Call it once `accelerate.Accelerator` exists: what counts is what Accelerate made of the launch.

    Args:
        state: `Accelerator.state`, by default that of this process.
        environment: of the process.

    Raises:
        FinetuneError: processes that do not know of each other; one where several were asked for; no sharding where
            it was asked for. The message has the command that works.
    """
    state = _own_state() if state is None else state
    environment = os.environ if environment is None else environment
    kind = getattr(state.distributed_type, "value", state.distributed_type)
    asked = next(((key, int(environment[key])) for key in _WORLD_SIZES if _is_number(environment.get(key))), None)
    if asked is not None and asked[1] > 1 and state.num_processes != asked[1]:
        raise FinetuneError(
            f"launch: {asked[0]} asks for {asked[1]} processes, but Accelerate took this one for one of "
            f"{state.num_processes} ({kind}), so each would train on its own; use {_command(asked[1])}"
        )
    if asked is None and state.num_processes == 1 and _one_of_several(environment):
        raise FinetuneError(
            "launch: `accelerate launch` was asked for several processes and started one, as it does on CPUs; use "
            f"{_command(2)}, with --num_processes 1 for one (and without MASTER_ADDR, MASTER_PORT of your own)"
        )
    for key, expected in _SHARDING.items():
        if environment.get(key, "").lower() == "true" and kind != expected:
            raise FinetuneError(
                f"launch: {expected} was asked for ({key}), but Accelerate made {kind} of it, as it does without "
                f"GPUs; launch without it ({_command(max(2, state.num_processes))}), or on GPUs"
            )


def _own_state() -> Any:
    from accelerate.state import AcceleratorState

    if not AcceleratorState._shared_state:
        raise RuntimeError("check_launch needs an Accelerator: make one first")
    return AcceleratorState()


def _one_of_several(environment: Mapping[str, str]) -> bool:
    """Whether `accelerate launch` set an address at which several processes meet, which it does for several only."""
    launched = "ACCELERATE_MIXED_PRECISION" in environment and "LOCAL_RANK" not in environment
    return launched and "MASTER_ADDR" in environment and "MASTER_PORT" in environment


def _command(count: int) -> str:
    prefix = "" if torch.cuda.is_available() else "ACCELERATE_USE_CPU=true "
    return f"`{prefix}torchrun --nproc_per_node {count} {_SCRIPT}`"


def _is_number(text: str | None) -> bool:
    return text is not None and text.isdigit()
