"""What carries a run over devices and processes: Accelerate, with a whole model in each process or one in shards.

Of the engines that shard, it is FSDP 2 (`fully_shard`): its parameters are the ones that are trained, so that a sample
of them is what the next forward pass computes with. FSDP 1 and DeepSpeed ZeRO train copies, out of reach of samples.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergekit_bayes.errors import FinetuneError
from mergekit_bayes.finetune.trackers import check_trackers

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mergekit_bayes.recipe.finetune import FinetuneRecipe, TrainingSpec

__all__ = ["any_of", "check_engine", "loading_device", "make_accelerator", "shard", "shards"]

_DDP = "use DDP, which keeps a whole model in every process (launch without it)"
_FSDP_2 = "or FSDP 2 (`accelerate launch --use_fsdp --fsdp_version 2 ...`), on GPUs"


def make_accelerator(training: TrainingSpec, folder: Path) -> Accelerator:
    """Returns the accelerator of a run.

    Args:
        training: the recipe's section.
        folder: where trackers put their files.

    Raises:
        FinetuneError: a tracker that is not installed, or a precision that the device has not.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    check_trackers(training.report_to)
    # a second run of one process may want another precision; device and processes stay what they are, but a launch
    # that has been taken for FSDP once is not given its plugin again
    before = getattr(PartialState._shared_state.get("distributed_type"), "value", None)
    AcceleratorState._reset_state(reset_partial_state=before == "FSDP")
    precision = "bf16" if training.bf16 else "fp16" if training.fp16 else "no"
    try:
        return Accelerator(mixed_precision=precision, log_with=list(training.report_to) or None, project_dir=folder)
    except ValueError as error:
        if precision == "no":
            raise
        raise FinetuneError(f"training.{precision}: this device does not compute in it: {error}") from error


def shards(accelerator: Accelerator) -> bool:
    """Whether the model will be spread over the processes."""
    return bool(accelerator.distributed_type.value == "FSDP")


def check_engine(accelerator: Accelerator, recipe: FinetuneRecipe) -> None:
    """Makes sure that the launch is one that the trainer trains rightly under.

    Raises:
        FinetuneError: an engine that trains copies of the weights, or splits more than rows and parameters; or an
            option that does not go together with sharding.
    """
    kind = accelerator.distributed_type.value
    if kind == "DEEPSPEED":
        raise FinetuneError(
            f"launch: DEEPSPEED: ZeRO trains copies of the weights, which samples of IVON would not reach; {_DDP}, "
            f"{_FSDP_2}"
        )
    if kind == "FSDP" and not accelerator.is_fsdp2:
        seen = "launch: FSDP 1 trains flattened copies of the weights, which samples of IVON would not reach"
        raise FinetuneError(f"{seen}; {_DDP}, {_FSDP_2}")
    if kind not in {"NO", "FSDP"} and not kind.startswith("MULTI_"):
        raise FinetuneError(f"launch: {kind}: is not supported; {_DDP}, {_FSDP_2}")
    layout = getattr(accelerator, "parallelism_config", None)
    split = [name for name in ("tp", "cp", "sp") if getattr(layout, f"{name}_enabled", False)]
    if split:
        raise FinetuneError(
            f"launch: {', '.join(split)}_size > 1 splits layers or rows; expected data parallelism only"
        )
    if kind == "FSDP":
        _check_sharded(accelerator, recipe)


def _check_sharded(accelerator: Accelerator, recipe: FinetuneRecipe) -> None:
    faults = {
        "model.load_in_4bit, load_in_8bit: quantised weights stay whole in every process; launch without FSDP": (
            recipe.model.load_in_4bit or recipe.model.load_in_8bit
        ),
        "training.fp16: processes would scale the loss each in its way; set `training.bf16: true` instead": (
            recipe.training.fp16
        ),
        "optimizer.noise: per_process needs the whole gradient in every process; expected shared": (
            getattr(recipe.optimizer, "noise", "shared") != "shared"
        ),
        "FSDP's own activation checkpointing renames the weights; set `training.gradient_checkpointing: true`": (
            accelerator.state.fsdp_plugin.activation_checkpointing
        ),
    }
    for fault, there in faults.items():
        if there:
            raise FinetuneError(f"launch: FSDP: {fault}")


def loading_device(accelerator: Accelerator) -> torch.device:
    """Returns where a model is loaded: to be sharded it is not put on one accelerator, where it may have no room."""
    return torch.device("cpu") if shards(accelerator) else accelerator.device


def shard(accelerator: Accelerator, model: Any) -> None:
    """Spreads a model over the processes, in place, layer by layer or as the launch says.

    Its parameters are others afterwards. Gradients are added in float32 whatever the model computes in, as everywhere.

    Args:
        accelerator: made under FSDP 2.
        model: as loaded; where the launch asks for efficient loading, only the first process has its weights.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    plugin = accelerator.state.fsdp_plugin
    if "FSDP_AUTO_WRAP_POLICY" not in os.environ:
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = _layers(model)
    if accelerator.mixed_precision == "bf16":
        plugin.mixed_precision_policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    # Accelerate wants an optimizer to give the new parameters to; ours is made of them, since starting values are
    # derived from weights that not every process has before
    stand_in = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    accelerator.prepare(model, stand_in)


def _layers(model: Any) -> list[str]:
    """Classes of the layers that are gathered one at a time.

    Some encoders name the module that holds the embedding among them; Accelerate shards the embedding by itself,
    afterwards, which fails inside of what is sharded already.
    """
    embedding = model.get_input_embeddings()
    holders = {
        type(module).__name__
        for module in model.modules()
        if module is not embedding and any(part is embedding for part in module.modules())
    }
    return sorted(set(getattr(model, "_no_split_modules", None) or ()) - holders)


def any_of(accelerator: Accelerator, flag: bool) -> bool:
    """Returns whether the flag is set in any process; every process must call this."""
    if accelerator.num_processes == 1:
        return flag
    value = torch.tensor(int(flag), device=accelerator.device)
    return bool(accelerator.reduce(value, "sum") > 0)
