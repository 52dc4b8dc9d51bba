"""Scores of answers to multiple-choice questions, against transformers called one choice at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, brier_score_loss, log_loss

from mergekit_bayes.errors import EvaluateError, RecipeError
from mergekit_bayes.evaluate.run import evaluate
from mergekit_bayes.predict import attach_posterior, prune_posterior, sample_posterior
from tests.evaluate.runs import TABLES, recipe, run
from tests.evaluate.test_language import loaded
from tests.evaluate.test_resume import Blocks, content
from tests.harness_tasks import rows, write_tasks

ASKED = TABLES["questions"]
MOST = max(len(row["choices"]) for row in ASKED)


def asked(models: list[object], **keys: Any) -> dict[str, Any]:
    return recipe(models, **{"task": "multiple_choice", "data": "questions", **keys})


@torch.no_grad()
def likelihoods(model: Any, data: str = "questions") -> list[np.ndarray[Any, Any]]:
    """Log-likelihood of every choice of every question, a choice at a time; a token is a word `w<number>`."""
    found = []
    for row in TABLES[data]:
        own = []
        for choice in row["choices"]:
            before, after = ([int(word[1:]) for word in text.split()] for text in (row["question"], choice))
            logits = model(input_ids=torch.tensor([[*before, *after]])).logits[0].double().log_softmax(-1)
            own.append(sum(float(logits[len(before) + at - 1, token]) for at, token in enumerate(after)))
        found.append(np.array(own))
    return found


def probabilities(found: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """Softmax over the choices of each question, 0 where a question has fewer."""
    table = np.zeros((len(found), MOST))
    for row, own in enumerate(found):
        table[row, : len(own)] = np.exp(own - own.max()) / np.exp(own - own.max()).sum()
    return table


def expected(table: np.ndarray[Any, Any], found: list[np.ndarray[Any, Any]]) -> dict[str, float]:
    """Scores of probabilities and of log-likelihoods per byte."""
    answers = [row["answer"] for row in ASKED]
    per_byte = [own / [len(choice) for choice in row["choices"]] for own, row in zip(found, ASKED, strict=True)]
    sure, right = table.max(-1), table.argmax(-1) == answers
    places = np.ceil(sure * 15)
    return {
        "accuracy": accuracy_score(answers, table.argmax(-1)),
        "normalised_accuracy": accuracy_score(answers, [own.argmax() for own in per_byte]),
        "nll": log_loss(answers, table, labels=range(MOST)),
        "brier": brier_score_loss(answers, table, labels=range(MOST), scale_by_half=False),
        "ece": sum(abs((sure - right)[places == place].sum()) for place in set(places)) / len(answers),
        "selective_accuracy@0.5": right[np.argsort(-sure)[: len(answers) // 2]].mean(),
    }


def values(found: dict[str, Any]) -> dict[str, float]:
    return {metric: score["value"] for metric, score in found.items()}


def test_all_scores(llama: Path, tuned: Path) -> None:
    models = [llama, {"model": str(tuned), "name": "tuned"}]
    results = run(asked(models, coverage=0.5, batch_size=3)).results
    assert results["task"] == "multiple_choice"
    assert results["data"][0]["rows"] == len(ASKED) == results["data"][0]["units"].popitem()[1]
    wanted = {}
    for title, model in ((str(llama), loaded(llama)), ("tuned", loaded(llama, tuned))):
        found = likelihoods(model)
        wanted[title] = expected(probabilities(found), found)
        assert values(results["scores"][title]["questions"]) == pytest.approx(wanted[title], rel=1e-5)
        assert [*results["scores"][title]["questions"]][:3] == ["accuracy", "normalised_accuracy", "nll"]
        bins = results["reliability"][title]["questions"]
        assert sum(each["rows"] for each in bins) == len(ASKED)
    for metric, found in results["differences"]["tuned"]["questions"].items():
        assert found["difference"] == pytest.approx(wanted["tuned"][metric] - wanted[str(llama)][metric], abs=1e-6)
        assert found["low"] <= found["difference"] <= found["high"]
    assert wanted[str(llama)]["accuracy"] != wanted[str(llama)]["normalised_accuracy"]


def test_samples_average_probabilities_of_choices(llama: Path, tuned: Path) -> None:
    samples = {"count": 3, "temperature": 0.5}
    result = run(asked([tuned], samples=samples, seed=5, coverage=0.5)).results
    model = loaded(llama, tuned)
    posterior = attach_posterior(model, tuned)
    drawn = []
    for sample in range(3):
        with sample_posterior(model, posterior, sample=sample, temperature=0.5, seed=5):
            drawn.append(likelihoods(model))
    averaged = np.mean([probabilities(found) for found in drawn], axis=0)
    together = [np.log(np.mean(np.exp([found[row] for found in drawn]), axis=0)) for row in range(len(ASKED))]
    found = result["scores"][f"{tuned} (3 samples)"]["questions"]
    assert values(found) == pytest.approx(expected(averaged, together), rel=1e-4)
    assert found["nll"]["value"] != result["scores"][str(tuned)]["questions"]["nll"]["value"]


def test_pruned_models(llama: Path, tuned: Path) -> None:
    result = run(asked([tuned], prune=0.5, coverage=0.5)).results
    model = loaded(llama, tuned)
    with prune_posterior(model, attach_posterior(model, tuned), 0.5):
        found = likelihoods(model)
    pruned = result["scores"][f"{tuned} (pruned 0.5)"]["questions"]
    assert values(pruned) == pytest.approx(expected(probabilities(found), found), rel=1e-5)


def test_a_temperature_is_chosen_on_other_questions(tuned: Path) -> None:
    samples = {"count": 2, "temperature": "validation"}
    result = run(asked([tuned], samples=samples, validation="other questions")).results
    chosen = result["models"][f"{tuned} (2 samples)"]["chosen_temperature"]
    assert chosen["temperature"] == result["models"][f"{tuned} (2 samples)"]["temperature"]
    mean = run(asked([tuned], data="other questions")).value(str(tuned), "other questions", "nll")
    assert chosen["nll_of_mean"] == pytest.approx(mean)
    there = {"count": 2, "temperature": chosen["temperature"]}
    if chosen["temperature"]:
        again = run(asked([tuned], data="other questions", samples=there))
        assert again.value(f"{tuned} (2 samples)", "other questions", "nll") == pytest.approx(chosen["nll"])


def test_a_choice_of_one_token_costs_the_loss_of_a_language_model(llama: Path) -> None:
    """The model's own loss, with labels as transformers takes them, gives the odds of two choices."""
    model, losses = loaded(llama), []
    for token in (4, 5):
        ids = torch.tensor([[1, 2, 3, token]])
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=torch.tensor([[-100, -100, -100, token]])).loss))
    table = [{"question": "w1 w2 w3", "choices": ["w4", "w5"], "answer": 0}]
    found = evaluate(asked([llama], data="one"), tables={"one": table}).value(str(llama), "one", "nll")
    assert found == pytest.approx(math.log1p(math.exp(losses[0] - losses[1])), rel=1e-5)


def test_batches_change_nothing(llama: Path) -> None:
    one, two = (run(asked([llama], batch_size=size)).results["scores"][str(llama)] for size in (1, 32))
    assert values(one["questions"]) == pytest.approx(values(two["questions"]), rel=1e-5)


def test_the_format_of_data_says_the_task(llama: Path) -> None:
    told = run(recipe([llama], data={"eval": {"path": "questions", "format": "multiple_choice"}})).results
    assert told["task"] == "multiple_choice"
    assert told["scores"] == run(asked([llama])).results["scores"]


def test_what_does_not_belong_together(llama: Path, bert: Path) -> None:
    with pytest.raises(EvaluateError, match=r"`task` is multiple_choice, .*bert for sequence_classification"):
        run(asked([llama, bert]))
    with pytest.raises(RecipeError, match="`loss` is none of `multiple_choice`; those are `accuracy`, `normalised_"):
        run(asked([llama], metrics=["loss"]))
    data = {"eval": {"path": "questions", "format": "multiple_choice"}}
    with pytest.raises(RecipeError, match="models of `multiple_choice` have no perplexity"):
        run(recipe([llama], data=data, metrics=["perplexity"]))
    with pytest.raises(RecipeError, match="models of `sequence_classification` have no normalised_accuracy"):
        run(recipe([bert], data="labelled", metrics=["normalised_accuracy"]))


@pytest.mark.slow
def test_a_folder_of_results(llama: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Blocks(monkeypatch)
    models: list[object] = [llama, {"model": str(tuned), "samples": {"count": 2}}]
    whole = run(asked(models), tmp_path / "whole").folder
    assert whole is not None
    names = ["evaluate_recipe.yaml", "reliability.png", "results.json", "rows", "scores.png"]
    assert sorted(path.name for path in whole.iterdir()) == names
    lines = (whole / "rows" / "00.jsonl").read_text().splitlines()[1:]
    assert [len(json.loads(line)["numbers"]) for line in lines] == [2 * len(row["choices"]) for row in ASKED]
    needed, blocks.computed, blocks.at = blocks.computed, 0, 3
    with pytest.raises(KeyboardInterrupt):
        run(asked(models), tmp_path / "cut")
    blocks.at = None
    run(asked(models), tmp_path / "cut")
    assert blocks.computed == needed, "no block was computed twice"
    assert content(tmp_path / "cut") == content(whole)
    run(asked([llama]), tmp_path / "cut", overwrite=True)
    assert blocks.computed == needed, "what stood there was known"


def test_rows_are_spread(llama: Path) -> None:
    result = run(asked([llama], max_rows=4)).results
    assert result["data"][0]["rows"] == 4
    places = [0, 7, 14, 21]
    found = likelihoods(loaded(llama))
    nll = [-math.log(probabilities(found)[place, ASKED[place]["answer"]]) for place in places]
    assert result["scores"][str(llama)]["questions"]["nll"]["value"] == pytest.approx(np.mean(nll), rel=1e-5)


def test_the_harness_agrees(llama: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    import transformers

    from mergekit_bayes.predict.harness import open_tasks
    from mergekit_bayes.recipe.harness import HarnessSpec

    folder = write_tasks(tmp_path / "tasks")
    rows(folder / "questions.jsonl", [{**row, "label": row["answer"]} for row in ASKED])
    (task,) = open_tasks(HarnessSpec.model_validate({"include_path": str(folder), "tasks": ["pick"]}))
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    theirs = task.run(loaded(llama), tokenizer, batch_size=4, title="m").metrics["pick"]
    ours = run(asked([llama]))
    assert ours.value(str(llama), "questions", "accuracy") == theirs["acc"].value
    assert ours.value(str(llama), "questions", "normalised_accuracy") == theirs["acc_norm"].value
