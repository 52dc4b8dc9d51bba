"""The section `training`: how long, in which batches, at which precision; names of transformers' TrainingArguments.

training: {num_train_epochs: 2, per_device_train_batch_size: 16, warmup_steps: 0.05, bf16: true}
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from mergekit_bayes.recipe import field
from mergekit_bayes.recipe.problem import Problem, Refusal, did_you_mean, refusal, show
from mergekit_bayes.recipe.spec import Entries, Spec, checked

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr")
Schedule: TypeAlias = Literal["linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr"]

TRACKERS = (
    "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb",
)  # fmt: skip
"""The trackers Accelerate writes to."""

_count = field.integer(1)
_tracker = field.choice(
    *TRACKERS, also={"comet": "comet_ml", "weights_and_biases": "wandb", "w&b": "wandb", "tb": "tensorboard"}
)


def _max_steps(value: object) -> int:
    if value == -1 and not isinstance(value, bool | float):
        return -1
    try:
        return _count(value)
    except Refusal as error:
        raise refusal(f"{error} Leave it out to train for `num_train_epochs`.") from None


def _warmup(value: object) -> float:
    number = field.number(value)
    if isinstance(number, int):
        return field.integer(0)(number)
    if not 0 <= number < 1:
        raise refusal(f"expected a number of steps, or a share of them of at least 0 and below 1, found {show(value)}.")
    return number


def _schedule_options(value: object) -> Entries[float]:
    found = field.entries(field.between(0, 1))(value)
    problems = [
        Problem((name,), f"unknown key.{did_you_mean(name, ('min_lr_rate',)) or ' Known here: `min_lr_rate`.'}", True)
        for name in found
        if name != "min_lr_rate"
    ]
    if problems:
        raise refusal(*problems)
    return found


def _trackers(value: object) -> tuple[str, ...]:
    if value is None or value in ("none", ["none"], ("none",)):
        return ()
    if value == "all":
        raise refusal("found `all`; name the trackers, such as `[tensorboard]`.")
    if isinstance(value, str):
        return (_tracker(value),)
    return field.several(_tracker, empty=True)(value)


def _resume(value: object) -> bool | str:
    return value if isinstance(value, bool) else field.text(value)


class TrainingSpec(Spec):
    """The run.

    Attributes:
        num_train_epochs: passes over the training data; need not be whole.
        max_steps: optimizer steps; wins over num_train_epochs; -1 for those.
        per_device_train_batch_size: rows per process and micro-batch.
        per_device_eval_batch_size: rows per process in evaluation.
        gradient_accumulation_steps: micro-batches per optimizer step.
        lr_scheduler_type: how the learning rate changes over the run.
        lr_scheduler_kwargs: options of the schedule: `min_lr_rate`, the last learning rate over the first.
        warmup_steps: optimizer steps of linear warm-up, or below 1 the share of all steps.
        max_grad_norm: longer gradients are shortened to this norm; 0 for none.
        bf16: compute in bfloat16 where that is safe (autocast).
        fp16: compute in float16, with loss scaling.
        gradient_checkpointing: recompute activations instead of keeping them.
        eval_steps: optimizer steps between evaluations; None for one at the end.
        save_steps: optimizer steps between checkpoints; None for none before the end.
        save_total_limit: how many checkpoints are kept; None for all.
        logging_steps: optimizer steps between lines of the log.
        seed: of initialisation, dropout and noise.
        data_seed: of the order of the rows; None for seed.
        resume_from_checkpoint: True to go on from the newest checkpoint of the same output if there is one, False to
            start anew, or the path of a checkpoint.
        report_to: trackers, by their names in Accelerate.
        dataloader_num_workers: processes that prepare batches; 0 for none.
    """

    num_train_epochs: Annotated[float, checked(field.positive)] = 3.0
    max_steps: Annotated[int, checked(_max_steps)] = -1
    per_device_train_batch_size: Annotated[int, checked(_count)] = 8
    per_device_eval_batch_size: Annotated[int, checked(_count)] = 8
    gradient_accumulation_steps: Annotated[int, checked(_count)] = 1
    lr_scheduler_type: Annotated[Schedule, checked(field.choice(*SCHEDULES))] = "linear"
    lr_scheduler_kwargs: Annotated[Entries[float], checked(_schedule_options)] = Entries()
    warmup_steps: Annotated[int | float, checked(_warmup)] = 0
    max_grad_norm: Annotated[float, checked(field.between(0))] = 1.0
    bf16: Annotated[bool, checked(field.boolean)] = False
    fp16: Annotated[bool, checked(field.boolean)] = False
    gradient_checkpointing: Annotated[bool, checked(field.boolean)] = False
    eval_steps: Annotated[int | None, checked(field.optional(_count))] = None
    save_steps: Annotated[int | None, checked(field.optional(_count))] = None
    save_total_limit: Annotated[int | None, checked(field.optional(_count))] = None
    logging_steps: Annotated[int, checked(_count)] = 10
    seed: Annotated[int, checked(field.integer(0))] = 0
    data_seed: Annotated[int | None, checked(field.optional(field.integer(0)))] = None
    resume_from_checkpoint: Annotated[bool | str, checked(_resume)] = True
    report_to: Annotated[tuple[str, ...], checked(_trackers)] = ()
    dataloader_num_workers: Annotated[int, checked(field.integer(0))] = 0

    def without_effect(self) -> frozenset[str]:
        """A number of steps wins over a number of epochs."""
        return frozenset({"num_train_epochs"}) if self.max_steps > 0 else frozenset()
