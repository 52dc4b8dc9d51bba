"""Scores of language models against transformers called one row at a time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from mergekit_bayes.predict import attach_posterior, prune_posterior, sample_posterior
from tests.evaluate.runs import TABLES, recipe, run


def loaded(base: Path, adapter: Path | None = None) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return (model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)).eval()


def targets(base: Path, data: str = "texts") -> list[torch.Tensor]:
    """Every row with the token that ends it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    return [torch.tensor([*tokenizer(row["text"])["input_ids"], tokenizer.eos_token_id]) for row in TABLES[data]]


@torch.no_grad()
def log_probabilities(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Of every token but the first, float64."""
    logits = model(input_ids=tokens[None]).logits[0, :-1].double()
    return logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0]


def loss_of(found: list[torch.Tensor]) -> float:
    return -float(torch.cat(found).mean())


def words_after_the_first(data: str = "texts") -> int:
    """Bytes of what is predicted: everything behind the first word, blanks included."""
    return sum(len(row["text"].partition(" ")[2]) + 1 for row in TABLES[data])


def test_loss_perplexity_and_bits_per_byte(llama: Path, tuned: Path) -> None:
    result = run(recipe([llama, {"model": str(tuned), "name": "tuned"}], data=["texts", "other texts"]))
    for title, model in ((str(llama), loaded(llama)), ("tuned", loaded(llama, tuned))):
        for data in ("texts", "other texts"):
            found = [log_probabilities(model, tokens) for tokens in targets(llama, data)]
            loss = loss_of(found)
            assert result.value(title, data, "loss") == pytest.approx(loss, rel=1e-6)
            assert result.value(title, data, "perplexity") == pytest.approx(math.exp(loss), rel=1e-6)
            bits = -float(torch.cat(found).sum()) / math.log(2) / words_after_the_first(data)
            assert result.value(title, data, "bits_per_byte") == pytest.approx(bits, rel=1e-6)


def test_an_adapter_may_be_named_with_its_base_or_find_it(llama: Path, tuned: Path) -> None:
    models = [f"{llama}+{tuned}", {"model": str(tuned), "base_model": str(llama), "name": "based"}, str(tuned)]
    found = run(recipe(models)).results["scores"]
    assert len({json.dumps(scores) for scores in found.values()}) == 1


def test_samples_average_probabilities_of_every_token(llama: Path, tuned: Path) -> None:
    samples = {"count": 3, "temperature": 0.5}
    result = run(recipe([tuned], samples=samples, seed=5))
    model = loaded(llama, tuned)
    posterior = attach_posterior(model, tuned)
    drawn = []
    for sample in range(3):
        with sample_posterior(model, posterior, sample=sample, temperature=0.5, seed=5):
            drawn.append(torch.cat([log_probabilities(model, tokens) for tokens in targets(llama)]))
    averaged = torch.stack(drawn).exp().mean(0).log()
    assert result.value(f"{tuned} (3 samples)", "texts", "loss") == pytest.approx(-float(averaged.mean()), rel=1e-5)
    mean = loss_of([log_probabilities(model, tokens) for tokens in targets(llama)])
    assert result.value(str(tuned), "texts", "loss") == pytest.approx(mean, rel=1e-6)


def test_pruned_models(llama: Path, tuned: Path) -> None:
    result = run(recipe([tuned], prune=[0.25, 1.0]))
    model = loaded(llama, tuned)
    with prune_posterior(model, attach_posterior(model, tuned), 0.25):
        loss = loss_of([log_probabilities(model, tokens) for tokens in targets(llama)])
    assert result.value(f"{tuned} (pruned 0.25)", "texts", "loss") == pytest.approx(loss, rel=1e-6)
    base = loss_of([log_probabilities(loaded(llama), tokens) for tokens in targets(llama)])
    assert result.value(f"{tuned} (pruned 1)", "texts", "loss") == pytest.approx(base, rel=1e-6)
    assert any("pruned 56 of 224 entries (25.0%)" in note for note in result.results["notes"]), result.results["notes"]


def test_the_temperature_is_the_best_of_the_validation_rows(tuned: Path) -> None:
    result = run(recipe([tuned], samples={"count": 2, "temperature": "validation"}, validation="other texts"))
    about = result.results["models"][f"{tuned} (2 samples)"]
    chosen = about["chosen_temperature"]
    assert about["temperature"] == chosen["temperature"]
    assert chosen["nll"] == min(loss for _, loss in chosen["tried"]) <= chosen["nll_of_mean"]
    (note,) = result.results["notes"]
    by_mean = "no samples were better than the mean" in note
    assert by_mean or f"temperature {chosen['temperature']:.3g} by the validation rows" in note
    assert by_mean == (chosen["temperature"] == 0)
    titles = [str(tuned), f"{tuned} (2 samples)"]
    again = run(recipe([tuned], data="other texts", samples={"count": 2, "temperature": chosen["temperature"] or 1e-9}))
    found = [again.value(title, "other texts", "loss") for title in titles]
    assert found == pytest.approx([chosen["nll_of_mean"], chosen["nll"]], rel=1e-5)


def test_packed_rows(llama: Path) -> None:
    """Windows of a joined text: every token but the first of a window is predicted."""
    data = {"eval": "texts", "packing": True, "max_length": 16}
    result = run(recipe([llama], data=data))
    joined = torch.cat(targets(llama))
    model = loaded(llama)
    loss = loss_of([log_probabilities(model, window) for window in joined.split(16) if len(window) > 1])
    assert result.value(str(llama), "texts", "loss") == pytest.approx(loss, rel=1e-5)


def test_a_difference_is_that_of_the_same_rows(llama: Path, tuned: Path) -> None:
    result = run(recipe([llama, {"model": str(tuned), "name": "tuned"}, {"model": str(llama), "name": "again"}]))
    differences = result.results["differences"]
    assert [*differences] == ["tuned", "again"]
    found = differences["tuned"]["texts"]["loss"]
    expected = result.value("tuned", "texts", "loss") - result.value(str(llama), "texts", "loss")
    assert found["difference"] == pytest.approx(expected)
    assert found["low"] < expected < found["high"]
    assert differences["again"]["texts"]["loss"] == {
        "difference": 0.0,
        "low": 0.0,
        "high": 0.0,
        "higher_is_better": False,
    }
    other = run(recipe([llama, {"model": str(tuned), "name": "tuned"}], baseline="tuned")).results
    assert other["baseline"] == "tuned"
    assert other["differences"][str(llama)]["texts"]["loss"]["difference"] == pytest.approx(-expected)
