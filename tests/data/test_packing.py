"""Packed rows: nothing is lost, rows do not see each other, and a model that cannot keep them apart is found out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bayes.data import Row, Rows, collate, packing_fault
from mergekit_bayes.data.packing import best_fit, pack, windows
from tests.data.loading import load, pairs, texts
from tests.data.made import encoded, rows_of
from tests.data.tokenizers import turns, whole
from tests.tiny_models import VOCABULARY, tiny_model

SIZES = st.lists(st.integers(1, 20), max_size=40)


@given(SIZES)
def test_every_item_is_in_one_bin_and_none_overflows(sizes: list[int]) -> None:
    bins = best_fit(sizes, 20)
    assert sorted(index for group in bins for index in group) == list(range(len(sizes)))
    assert all(sum(sizes[index] for index in group) <= 20 for group in bins)
    # bins that are at most half full could have been one
    assert sum(2 * sum(sizes[index] for index in group) <= 20 for group in bins) <= 1


@given(SIZES)
def test_best_fit_is_the_slow_and_obvious_one(sizes: list[int]) -> None:
    """Among the open bins with the least room that is enough, any will do; how full bins get is the same."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else 20) - size)
    assert sorted(20 - sum(sizes[i] for i in group) for group in best_fit(sizes, 20)) == sorted(rooms)


@given(st.lists(st.integers(2, 12), max_size=20))
def test_packed_rows_hold_every_row_whole(lengths: list[int]) -> None:
    rows = encoded(*lengths)
    packed = pack(rows, 12)
    found = []
    for row in packed:
        assert row.segments is not None
        assert row.targets is not None
        start = 0
        for length in row.segments:
            found.append(row.tokens[start : start + length].tolist())
            assert row.targets[start : start + length].tolist() == [False] + [True] * (length - 1)
            start += length
        assert start == len(row.tokens) <= 12
    assert sorted(found) == sorted(row.tokens.tolist() for row in rows)


@given(st.lists(st.integers(1, 12), max_size=20), st.integers(2, 9))
def test_windows_hold_all_text_in_order(lengths: list[int], width: int) -> None:
    rows = encoded(*lengths)
    cut = windows(rows, width)
    tokens = [token for row in cut for token in row.tokens.tolist()]
    everything = list(range(sum(lengths)))
    # a last token that would be alone in its window predicts nothing
    assert tokens == everything or (tokens == everything[:-1] and len(everything) % width == 1)
    assert all(len(row.tokens) == width for row in cut[:-1])
    assert all(
        row.targets is not None and row.targets.tolist() == [False] + [True] * (len(row.tokens) - 1) for row in cut
    )


def test_texts_are_joined_and_cut(tokenizer: Any) -> None:
    data = load(texts("the quick brown fox", "the lazy dog"), tokenizer, max_length=4, packing=True)
    assert [whole(tokenizer, row) for row in data.train] == [
        "the quick brown fox",
        "<|endoftext|>the lazy dog",
        "<|endoftext|>",
    ][:2]
    (report,) = data.report.datasets
    assert (report.read, report.segments, report.rows, report.truncated) == (2, 2, 2, 0)


def test_completions_and_conversations_are_put_together_whole(tokenizer: Any) -> None:
    talks = [{"messages": turns("hello", "hi there")}] * 2
    data = load((pairs(("the", " dog"), ("the quick", " fox"), ("a", " dog")), talks), tokenizer, packing=True)
    assert [row["segments"] for row in data.train] == [[4, 3, 3], [19, 19]]
    assert data.train.packed
    alone = load((pairs(("the", " dog"), ("the quick", " fox"), ("a", " dog")), talks), tokenizer)
    assert data.train.num_units == alone.train.num_units
    assert [report.segments for report in data.report.datasets] == [3, 2]
    assert data.report.lines()[0].startswith("memory0 (train, prompt_completion): 1 rows from 3, ")


def test_texts_and_conversations_can_be_mixed(tokenizer: Any) -> None:
    data = load((texts("the lazy dog"), [{"messages": turns("hello", "hi")}]), tokenizer, packing=True)
    assert all("segments" in row for row in data.train)


def test_positions_start_over_at_every_segment_and_in_the_padding() -> None:
    rows: list[Row] = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, -100, 4, 5], "segments": [2, 3]},
        {"input_ids": [6, 7], "labels": [-100, 7], "segments": [2]},
    ]
    batch = {name: tensor.tolist() for name, tensor in collate(rows, pad_token_id=0, task="causal_lm").items()}
    assert batch == {
        "input_ids": [[1, 2, 3, 4, 5], [6, 7, 0, 0, 0]],
        "labels": [[-100, 2, -100, 4, 5], [-100, 7, -100, -100, -100]],
        "position_ids": [[0, 1, 0, 1, 2], [0, 1, 0, 1, 2]],
    }
    flat = {
        name: tensor.tolist() for name, tensor in collate(rows, pad_token_id=0, task="causal_lm", flatten=True).items()
    }
    assert flat == {
        "input_ids": [[1, 2, 3, 4, 5, 6, 7]],
        "labels": [[-100, 2, -100, 4, 5, -100, 7]],
        "position_ids": [[0, 1, 0, 1, 2, 0, 1]],
    }


def losses(model: Any, rows: Sequence[Row], **options: Any) -> tuple[float, list[Any]]:
    """The summed loss, as training sums it, and its gradients."""
    import torch

    model.zero_grad()
    batch = collate(rows, pad_token_id=0, task="causal_lm", **options)
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    loss.backward()
    return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize(
    ("name", "attention", "dtype", "tolerance"),
    [
        ("llama", "sdpa", "float64", 1e-12),
        ("gpt2", "sdpa", "float64", 1e-12),
        ("llama", "eager", "float64", 1e-8),  # its softmax is computed in float32
        ("gemma2", "eager", "float32", 1e-5),
    ],
)
def test_packed_rows_have_exactly_the_loss_of_rows_on_their_own(
    name: str, attention: str, dtype: str, tolerance: float
) -> None:
    """Loss and gradients; padded and flattened, also with windows of attention that are shorter than a row."""
    import torch

    model = tiny_model(name, dtype=getattr(torch, dtype))
    model.set_attn_implementation(attention)
    if name == "gemma2":
        model.config.sliding_window = 4
    alone = rows_of(7, 3, 5, 2, 6, 4)
    packed = Rows(pack(encoded(7, 3, 5, 2, 6, 4), 12), task="causal_lm")
    assert [row["segments"] for row in packed] == [[7, 5], [6, 4, 2], [3]]
    expected, gradients = losses(model, list(alone))
    for options in ({}, {"flatten": True}):
        found, others = losses(model, list(packed), **options)
        assert found == pytest.approx(expected, rel=tolerance)
        for one, other in zip(gradients, others, strict=True):
            torch.testing.assert_close(other, one, rtol=1e3 * tolerance, atol=1e3 * tolerance)
    one_by_one = sum(losses(model, [row])[0] for row in alone)
    assert one_by_one == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gemma2", "gpt2", "mixtral"])
def test_models_that_keep_rows_apart(name: str, dtype: str) -> None:
    import torch

    model = tiny_model(name, dtype=getattr(torch, dtype)).train()
    assert packing_fault(model, vocabulary=VOCABULARY) is None
    assert packing_fault(model, vocabulary=VOCABULARY, flatten=True) is None
    assert model.training


def test_a_model_that_carries_its_state_across_is_found_out() -> None:
    import transformers

    config = transformers.MambaConfig(vocab_size=48, hidden_size=16, state_size=4, num_hidden_layers=1)
    model = transformers.MambaForCausalLM(config)
    fault = packing_fault(model, vocabulary=48)
    assert fault is not None
    assert "see each other" in fault or "does not take `position_ids`" in fault


def test_a_model_that_overlooks_where_positions_start_over_is_found_out() -> None:
    """Attention to everything before, whatever the positions say; and positions that run on."""
    import torch

    model = tiny_model("llama")
    forward = type(model).forward

    class Seeing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, position_ids: Any = None, **_: object) -> Any:
            return forward(self.model, input_ids=input_ids, attention_mask=torch.ones_like(input_ids))

    class Deaf(Seeing):
        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            raise AssertionError

    fault = packing_fault(Deaf(), vocabulary=48)
    assert fault is not None
    assert fault.startswith("it does not take `position_ids` without an attention mask (TypeError: ")

    fault = packing_fault(Seeing(), vocabulary=48)
    assert fault is not None
    assert "segments of a packed row see each other" in fault

    class RunningOn(Seeing):
        def forward(self, input_ids: Any, position_ids: Any = None, **_: object) -> Any:
            found = forward(self.model, input_ids=input_ids, position_ids=position_ids, use_cache=False)
            return type(found)(logits=found.logits + torch.arange(input_ids.shape[1])[None, :, None])

    fault = packing_fault(RunningOn(), vocabulary=48)
    assert fault is not None
    assert "segments of a packed row differ from the rows on their own" in fault
