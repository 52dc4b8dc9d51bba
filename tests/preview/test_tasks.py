"""Rows of a preview that the model has no place for are refused before the first mix."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mergekit_bayes.errors import EvaluateError
from mergekit_bayes.preview.tasks import TaskData, batch_sums, check_fit, score, scores_of_sums


def _task(*, largest_token: int = 47, longest: int = 32) -> TaskData:
    return TaskData(
        name="code",
        metric="loss",
        batches=({"labels": torch.zeros(1, 1, dtype=torch.int64)},),
        task="causal_lm",
        labels=None,
        units=1,
        key="",
        packed=False,
        largest_token=largest_token,
        longest=longest,
    )


@pytest.fixture(scope="module")
def model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=48, n_positions=32, n_embd=8, n_layer=1, n_head=1))


def test_rows_that_fit_pass(model: GPT2LMHeadModel) -> None:
    check_fit(model, [_task()], "base")


def test_a_row_beyond_the_last_position_is_refused(model: GPT2LMHeadModel) -> None:
    with pytest.raises(EvaluateError, match=r"task code: data\.max_length: the longest row has 33 .* places for 32"):
        check_fit(model, [_task(), _task(longest=33)], "base")


def test_a_token_beyond_the_vocabulary_is_refused(model: GPT2LMHeadModel) -> None:
    with pytest.raises(EvaluateError, match=r"task code: model base: the data holds token 48, the embedding has 48"):
        check_fit(model, [_task(largest_token=48)], "base")


def test_shares_of_the_batches_make_the_scores_of_all_of_them(model: GPT2LMHeadModel) -> None:
    draws = torch.randint(0, 48, (5, 2, 9), generator=torch.Generator().manual_seed(0))
    batches = tuple({"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)} for ids in draws)
    task = dataclasses.replace(_task(), batches=batches, units=5 * 2 * 8)
    model.eval()
    parts = [batch_sums(model, task, share=(rank, 3)) for rank in range(3)]
    assert [sorted(part) for part in parts] == [[0, 3], [1, 4], [2]]
    together = scores_of_sums(task, {place: each for part in reversed(parts) for place, each in part.items()})
    assert together == score(model, task)
    with torch.no_grad():
        losses = [model(**batch).loss for batch in batches]
    assert together[0]["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-6)
