"""Length of a run and learning rate, against transformers' own loop over its schedules."""

from __future__ import annotations

import pytest
import torch

from mergekit_bayes.errors import FinetuneError
from mergekit_bayes.finetune.schedule import learning_rate, run_length, warmup_steps


@pytest.mark.parametrize(
    ("rows", "batch", "epochs", "max_steps", "steps", "per_epoch"),
    [
        (10, 4, 3.0, -1, 9, 3),
        (12, 4, 0.5, -1, 2, 3),
        (12, 4, 0.001, -1, 1, 3),
        (12, 4, 3.0, 7, 7, 3),
        (1, 64, 1.0, -1, 1, 1),
    ],
)
def test_a_run_is_as_long_as_asked(
    rows: int, batch: int, epochs: float, max_steps: int, steps: int, per_epoch: int
) -> None:
    length = run_length(rows=rows, global_batch=batch, num_train_epochs=epochs, max_steps=max_steps)
    assert (length.steps, length.steps_per_epoch) == (steps, per_epoch)
    assert length.epochs == pytest.approx(steps / per_epoch)


def test_without_rows_there_is_nothing_to_train_on() -> None:
    with pytest.raises(FinetuneError, match="no rows are left"):
        run_length(rows=0, global_batch=4, num_train_epochs=1.0, max_steps=-1)


def test_warmup_is_a_number_of_steps_or_a_share() -> None:
    assert [warmup_steps(0, 100), warmup_steps(0.05, 100), warmup_steps(0.001, 100), warmup_steps(20, 100)] == [
        0,
        5,
        1,
        20,
    ]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("constant", {}),
        ("constant_with_warmup", {}),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ],
)
def test_the_rate_is_that_of_a_loop_over_the_schedule(name: str, arguments: dict[str, float]) -> None:
    from transformers import get_scheduler

    rate = learning_rate(name, peak=0.3, warmup=4, steps=20, arguments=arguments)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    options = {"num_warmup_steps": 4, "num_training_steps": 20, "scheduler_specific_kwargs": arguments}
    schedule = get_scheduler(name, optimizer, **options)
    for step in range(20):
        assert rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12)
        optimizer.step()
        schedule.step()


def test_an_argument_of_another_schedule_is_refused() -> None:
    with pytest.raises(FinetuneError, match=r"min_lr_rate.*does not fit lr_scheduler_type linear"):
        learning_rate("linear", peak=0.1, warmup=0, steps=10, arguments={"min_lr_rate": 0.1})
