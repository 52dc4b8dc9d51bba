"""Probabilities of next tokens: against samples averaged one by one, with masks, shifts and rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mergekit_bayes.errors import EvaluateError
from mergekit_bayes.predict import predict_next_tokens, sample_posterior, tokens
from tests.predict.small_models import NextToken, same, weights_in

VOCABULARY = 7


def batches() -> list[tuple[Tensor, Tensor]]:
    """Rows of several lengths, prompts without loss, one row with no target at all."""
    generator = torch.Generator().manual_seed(11)
    made = []
    for rows, length in ((3, 6), (1, 2), (2, 9)):
        ids = torch.randint(VOCABULARY, (rows, length), generator=generator)
        labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, -100)
        made.append((ids, labels))
    made[0][1][1] = -100
    return made


def one_by_one(model: nn.Module, samples: int, **options: float) -> list[tuple[Tensor, Tensor]]:
    """For every target its row and all probabilities, (samples, vocabulary), in float64, position by position."""
    found, row = [], 0
    for ids, labels in batches():
        for line, wanted in zip(ids, labels, strict=True):
            for place in range(1, len(line)):
                if wanted[place] == -100:
                    continue
                seen = []
                for sample in range(max(samples, 1)):
                    with torch.no_grad(), sample_posterior(model, {"table": 2.0}, sample=sample, **options):
                        seen.append(model(line[None])[0, place - 1].double().softmax(-1))
                found.append((torch.tensor([row, int(wanted[place])]), torch.stack(seen)))
            row += 1
    return found


@pytest.mark.parametrize("vocabulary", [False, True])
@pytest.mark.parametrize(("samples", "options"), [(0, {"temperature": 0.0}), (4, {"temperature": 0.5, "seed": 2})])
def test_the_average_is_that_of_the_samples_one_by_one(
    samples: int, options: dict[str, float], vocabulary: bool
) -> None:
    model = NextToken(VOCABULARY)
    before = weights_in(model)
    found = predict_next_tokens(model, batches(), {"table": 2.0}, samples=samples, vocabulary=vocabulary, **options)
    expected = one_by_one(model, samples, **options)
    rows, targets = torch.stack([place for place, _ in expected]).unbind(1)
    probabilities = torch.stack([seen for _, seen in expected])  # (tokens, samples, vocabulary)
    chances = probabilities.gather(2, targets[:, None, None].expand(-1, max(samples, 1), 1))[..., 0]
    assert torch.equal(found.rows, rows)
    torch.testing.assert_close(found.nll, -chances.mean(1).log(), rtol=1e-5, atol=1e-6)
    joint = torch.zeros(6, max(samples, 1), dtype=torch.float64).index_add(0, rows, chances.log())
    torch.testing.assert_close(found.row_log_probabilities, joint.exp().mean(1).log(), rtol=1e-5, atol=1e-6)
    assert found.row_log_probabilities[1] == 0
    assert same(weights_in(model), before)
    if not vocabulary:
        assert found.vocabulary is None
        return
    whole, average = found.vocabulary, probabilities.mean(1)
    torch.testing.assert_close(whole.entropy, -(average * average.log()).sum(-1), rtol=1e-5, atol=1e-5)
    expected_entropy = -(probabilities * probabilities.log()).sum(-1).mean(1)
    torch.testing.assert_close(whole.expected_entropy, expected_entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(whole.confidence, average.amax(-1), rtol=1e-5, atol=1e-6)
    assert torch.equal(whole.correct, average.argmax(-1) == targets)
    assert ((whole.mutual_information > 0) == (samples > 0)).all()


def test_rows_averaged_whole_are_not_products_of_averaged_tokens() -> None:
    found = predict_next_tokens(NextToken(VOCABULARY), batches(), {"table": 0.5}, samples=8)
    products = torch.zeros(6, dtype=torch.float64).index_add(0, found.rows, found.log_probabilities)
    assert (products - found.row_log_probabilities).abs().max() > 0.01


def test_nothing_as_large_as_samples_times_vocabulary_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "_CHUNK", 2 * VOCABULARY)  # two tokens at once
    model = NextToken(VOCABULARY)
    chunked = predict_next_tokens(model, batches(), {"table": 2.0}, samples=3)
    monkeypatch.undo()
    whole = predict_next_tokens(model, batches(), {"table": 2.0}, samples=3)
    assert torch.equal(chunked.log_probabilities, whole.log_probabilities)


class Fixed(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.logits = torch.zeros(shape)

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits


IDS = torch.zeros(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (NextToken(3), [], "no batch has a target"),
        (NextToken(3), [(IDS, torch.full_like(IDS, -100))], "no batch has a target"),
        (NextToken(3), [(IDS[:, :1], IDS[:, :1])], "no batch has a target"),
        (NextToken(3), [IDS], "a batch has no labels"),
        (NextToken(3), [(IDS, IDS[0])], r"labels of shape \(3,\)"),
        (Fixed(2, 3), [(IDS, IDS)], r"the logits have shape \(2, 3\); expected \(2, 3, vocabulary\)"),
        (Fixed(2, 4, 5), [(IDS, IDS)], r"the logits have shape \(2, 4, 5\)"),
    ],
)
def test_bad_input_is_refused(model: nn.Module, data: list[object], message: str) -> None:
    with pytest.raises(EvaluateError, match=message):
        predict_next_tokens(model, data)
