"""Answers of language models to multiple-choice questions, against sums of log-softmax by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from mergekit_bayes.errors import EvaluateError, NonFiniteError
from mergekit_bayes.predict import (
    attach_posterior,
    choice_scores,
    choose_temperature,
    predict_choices,
    predict_next_tokens,
    sample_posterior,
)
from tests.predict.small_models import NextToken, precisions_of, same, weights_in

VOCABULARY = 11

# the tokens of a question, those of each choice, and the right one
Asked = tuple[Sequence[int], Sequence[Sequence[int]], int]
ASKED: Sequence[Asked] = (
    ((1, 2, 3), ((4, 5), (6,), (7, 8, 9)), 1),
    ((5,), ((0,), (10, 10, 10)), 0),
    ((9, 8), ((1, 1), (2, 2), (3, 3), (4, 4)), 3),
)


def batch_of(asked: Sequence[Asked], *, pad: int = 0) -> dict[str, Any]:
    """One batch, padded on the right, in the layout of a language model."""
    rows = [(question, choice) for question, choices, _ in asked for choice in choices]
    width = max(len(question) + len(choice) for question, choice in rows)
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), -100)
    for row, (question, choice) in enumerate(rows):
        end = len(question) + len(choice)
        ids[row, :end] = torch.tensor([*question, *choice])
        labels[row, len(question) : end] = torch.tensor(choice)
    counts = torch.tensor([len(choices) for _, choices, _ in asked])
    return {"ids": ids, "labels": labels, "choices": counts, "answers": torch.tensor([right for *_, right in asked])}


def by_hand(model: NextToken, asked: Sequence[Asked]) -> list[np.ndarray[Any, Any]]:
    """Log-likelihood of every choice of every question, float64."""
    table = model.table.detach().double().numpy()
    following = table - np.log(np.exp(table).sum(-1, keepdims=True))

    def likelihood(question: Sequence[int], choice: Sequence[int]) -> float:
        before = [question[-1], *choice[:-1]]
        return float(sum(following[a, b] for a, b in zip(before, choice, strict=True)))

    return [np.array([likelihood(question, choice) for choice in choices]) for question, choices, _ in asked]


def softmax(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    powers = np.exp(values)
    return powers / powers.sum()


def test_probabilities_of_choices() -> None:
    model = NextToken(VOCABULARY)
    found = predict_choices(model, [batch_of(ASKED)])
    assert found.log_probabilities.shape == (3, 4)
    for number, likelihoods in enumerate(by_hand(model, ASKED)):
        count = len(likelihoods)
        assert found.log_likelihoods[number, :count].tolist() == pytest.approx(likelihoods.tolist(), rel=1e-6)
        assert found.probabilities[number, :count].tolist() == pytest.approx(softmax(likelihoods).tolist(), rel=1e-5)
        assert found.probabilities[number, count:].tolist() == [0] * (4 - count)
        assert found.log_likelihoods[number, count:].tolist() == [-math.inf] * (4 - count)
    assert found.known_labels.tolist() == [1, 0, 3]
    assert torch.equal(found.mutual_information, torch.zeros(3, dtype=torch.float64))


def test_a_choice_of_one_token_is_one_next_token() -> None:
    model = NextToken(VOCABULARY)
    single: Sequence[Asked] = (((1, 2), ((3,), (4,)), 0), ((5,), ((6,), (7,), (8,)), 2))
    batch = batch_of(single)
    tokens = predict_next_tokens(model, [{"ids": batch["ids"], "labels": batch["labels"]}])
    found = predict_choices(model, [batch]).log_likelihoods
    assert torch.equal(found[found > -math.inf], -tokens.nll)


questions = st.tuples(
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4),
    st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=4), min_size=2, max_size=5),
    st.just(1),
)


@given(asked=st.lists(questions, min_size=1, max_size=6), cut=st.integers(0, 6))
@settings(max_examples=25, deadline=None)
def test_batches_change_nothing(asked: list[Asked], cut: int) -> None:
    model = NextToken(VOCABULARY)
    whole = predict_choices(model, [batch_of(asked)])
    parts = [part for part in (asked[:cut], asked[cut:]) if part]
    cut_up = predict_choices(model, [batch_of(part, pad=3) for part in parts])
    assert torch.allclose(whole.log_likelihoods, cut_up.log_likelihoods, rtol=1e-6)
    assert torch.allclose(whole.probabilities, cut_up.probabilities, rtol=1e-5)


def test_samples_average_probabilities_of_choices() -> None:
    model = NextToken(VOCABULARY)
    before, precisions = weights_in(model), precisions_of(model)
    found = predict_choices(model, [batch_of(ASKED)], precisions, samples=5, temperature=2.0, seed=7)
    posterior = attach_posterior(model, precisions)
    drawn = []
    for sample in range(5):
        with sample_posterior(model, posterior, sample=sample, temperature=2.0, seed=7):
            drawn.append(by_hand(model, ASKED))
    for number, (_, choices, _) in enumerate(ASKED):
        own = [likelihoods[number] for likelihoods in drawn]
        probabilities = np.mean([softmax(each) for each in own], axis=0)
        joint = np.log(np.mean([np.exp(each) for each in own], axis=0))
        count = len(choices)
        assert found.probabilities[number, :count].tolist() == pytest.approx(probabilities.tolist(), rel=1e-5)
        assert found.log_likelihoods[number, :count].tolist() == pytest.approx(joint.tolist(), rel=1e-5)
        softened = softmax(np.mean(own, axis=0))
        assert np.abs(softened - probabilities).max() > 1e-3, "log-likelihoods were averaged"
    assert (found.mutual_information > 0).all()
    assert (found.samples, found.temperature, found.seed) == (5, 2.0, 7)
    assert same(weights_in(model), before)


def test_a_temperature_can_be_chosen() -> None:
    model, precisions = NextToken(VOCABULARY), {"table": torch.full((VOCABULARY, VOCABULARY), 1.0)}
    likelihoods = by_hand(model, ASKED)
    wrong = [(text, choices, int(np.argmin(own))) for (text, choices, _), own in zip(ASKED, likelihoods, strict=True)]
    chosen = choose_temperature(model, [batch_of(wrong)], precisions, predict=predict_choices, samples=4)
    assert chosen.temperature > 0, "who is wrong on every question does better when less sure"
    nll = predict_choices(model, [batch_of(wrong)], precisions, samples=4, temperature=chosen.temperature).nll
    assert chosen.nll == pytest.approx(float(nll.mean()))
    assert chosen.nll < chosen.nll_of_mean


def test_scores_of_choices() -> None:
    generator = np.random.default_rng(4)
    lengths = [[int(n) for n in generator.integers(1, 5, size=count)] for count in generator.integers(2, 6, size=80)]
    asked: list[Asked] = [
        ([1], [generator.integers(0, VOCABULARY, size=n).tolist() for n in own], int(generator.integers(len(own))))
        for own in lengths
    ]
    model = NextToken(VOCABULARY)
    likelihoods, answers = by_hand(model, asked), [right for *_, right in asked]
    sizes = torch.ones(80, 5, dtype=torch.float64)
    for row, own in enumerate(lengths):
        sizes[row, : len(own)] = torch.tensor(own) * 3.0
    scores = choice_scores(predict_choices(model, [batch_of(asked)]), sizes, bins=5)
    table = np.zeros((80, 5))
    for row, own in enumerate(likelihoods):
        table[row, : len(own)] = softmax(own)
    per_byte = [int(np.argmax(found / np.array(own))) for found, own in zip(likelihoods, lengths, strict=True)]
    sure, right = table.max(-1), table.argmax(-1) == answers
    bins = np.minimum(np.ceil(sure * 5), 5)
    gaps = [abs((sure - right)[bins == number].sum()) for number in range(6)]
    expected = {
        "accuracy": accuracy_score(answers, table.argmax(-1)),
        "normalised_accuracy": accuracy_score(answers, per_byte),
        "nll": log_loss(answers, table, labels=range(5)),
        "brier": brier_score_loss(answers, table, labels=range(5), scale_by_half=False),
        "ece": sum(gaps) / 80,
    }
    assert {name: score.value for name, score in scores.items()} == pytest.approx(expected, rel=1e-5)
    assert expected["accuracy"] != expected["normalised_accuracy"]
    assert scores["normalised_accuracy"].higher_is_better


def changed(**values: object) -> dict[str, Any]:
    return {**batch_of(ASKED), **values}


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "there are no batches; expected at least one"),
        ([{"ids": torch.zeros(2, 2)}], "has no `choices`; expected how many rows each of its questions has"),
        ([changed(choices=torch.tensor([3, 2, 3]))], r"9 rows for \[3, 2, 3\] choices; expected two or more"),
        ([changed(choices=torch.tensor([3, 5, 1]))], "expected two or more for every question, and a row for each"),
        ([changed(answers=torch.tensor([0, 1]))], "2 answers for 3 questions; expected one for each, or none"),
        ([changed(answers=torch.tensor([0, 2, 0]))], "answers from 0 to 2; expected indices of choices, counted from"),
        ([changed(answers=torch.tensor([0, -1, 0]))], "answers from -1 to 0"),
        ([changed(labels=torch.full((9, 6), -100))], "9 choices have no target token; expected one or more for each"),
        ([changed(labels=torch.zeros(9))], r"labels of shape \(9,\); expected \(rows, positions\)"),
    ],
)
def test_what_is_refused(batches: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(EvaluateError, match=message):
        predict_choices(NextToken(VOCABULARY), batches)


def test_answers_may_be_unknown() -> None:
    batch = batch_of(ASKED)
    del batch["answers"]
    found = predict_choices(NextToken(VOCABULARY), [batch])
    assert found.labels is None
    with pytest.raises(EvaluateError, match="had no labels"):
        _ = found.correct


def test_nan_is_no_answer() -> None:
    model = NextToken(VOCABULARY)
    with torch.no_grad():
        model.table[3] = math.nan
    with pytest.raises(NonFiniteError, match="NaN or infinity at its mean"):
        predict_choices(model, [batch_of(ASKED)])
