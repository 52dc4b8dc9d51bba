"""Rows of a preview that the model has no place for are refused before the first mix."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mergekit_bayes.errors import EvaluateError
from mergekit_bayes.preview.tasks import TaskData, check_fit


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
