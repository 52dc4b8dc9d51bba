"""Scores on held-out data, against sums written out row by row."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from mergekit_bayes.data import collate
from mergekit_bayes.finetune.evaluation import BINS, evaluate
from tests.finetune.tiny_rows import labelled_rows, text_rows
from tests.tiny_models import VOCABULARY, tiny_model


class ByFirstToken(torch.nn.Module):
    """A classifier with confidences of all sizes, which tiny transformers do not have."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter(torch.randn(VOCABULARY, 3, generator=generator) * 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: object = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids[:, 0]])


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_a_language_model_is_scored_token_by_token(batch_size: int) -> None:
    rows, model = text_rows(7), tiny_model("llama")
    loss = right = units = 0.0
    for row in rows:
        batch = collate([row], pad_token_id=0, task="causal_lm")
        with torch.no_grad():
            log_p = torch.log_softmax(model(**batch).logits[0].double(), -1)
        for position, label in enumerate(row["labels"]):  # type: ignore[arg-type]  # a list, for a language model
            if label != -100:
                loss -= float(log_p[position - 1, label])
                right += int(log_p[position - 1].argmax()) == label
                units += 1
    scores = evaluate(model, rows, pad_token_id=0, batch_size=batch_size, accelerator=Accelerator(cpu=True))
    assert scores["units"] == units == rows.num_units
    assert scores["loss"] == pytest.approx(loss / units, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(np.exp(loss / units), rel=1e-5)
    assert scores["accuracy"] == pytest.approx(right / units)


def test_a_classifier_is_scored_by_example_and_by_bin() -> None:
    rows, model = labelled_rows(40), ByFirstToken()
    probabilities = []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0]
        probabilities.append(torch.softmax(logits.double(), -1).numpy())
    p, labels = np.array(probabilities), np.array([row["labels"] for row in rows])
    confidence, correct = p.max(1), p.argmax(1) == labels
    place = np.minimum((confidence * BINS).astype(int), BINS - 1)
    ece = sum(
        (place == b).mean() * abs(confidence[place == b].mean() - correct[place == b].mean())
        for b in range(BINS)
        if (place == b).any()
    )
    scores = evaluate(model, rows, pad_token_id=0, batch_size=7, accelerator=Accelerator(cpu=True))
    assert scores["accuracy"] == pytest.approx(correct.mean())
    assert scores["loss"] == pytest.approx(-np.log(p[np.arange(40), labels]).mean(), rel=1e-5)
    assert scores["ece"] == pytest.approx(ece, rel=1e-4)
    assert len(set(place.tolist())) > 3


def test_the_mode_of_the_model_comes_back() -> None:
    model = tiny_model("llama")
    for mode in (True, False):
        model.train(mode)
        evaluate(model, text_rows(2), pad_token_id=0, batch_size=2, accelerator=Accelerator(cpu=True))
        assert model.training is mode
