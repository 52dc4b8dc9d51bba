"""The calibration study compares equals, keeps temperatures off the test data, and writes what it found."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.calibration import study
from evaluation.calibration.compare import compare, reliability
from evaluation.calibration.report import tables
from evaluation.calibration.scaling import best_factor, scaled
from mergekit_bayes.predict import ClassPrediction, class_scores
from tests.conftest import TinyCheckpoints

PAGE = Path(study.__file__).parent


def predicted(logits: torch.Tensor, labels: torch.Tensor) -> ClassPrediction:
    return ClassPrediction(logits.log_softmax(-1), torch.zeros(len(labels)), labels, samples=0, temperature=0.0, seed=0)


def test_scaling_finds_the_factor_that_was_lost() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 4, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    overconfident = predicted(3 * logits, labels)
    assert best_factor(overconfident) == pytest.approx(1 / 3, rel=0.05)
    assert torch.equal(scaled(overconfident, 0.3).correct, overconfident.correct)
    assert class_scores(scaled(overconfident, 1 / 3))["ece"].value < 0.02 < class_scores(overconfident)["ece"].value


def test_differences_are_second_minus_first_with_both_intervals() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, (300,), generator=generator)
    runs: dict[str, list[Any]] = {"AdamW, mean": [], "IVON, mean": []}
    for _ in range(3):
        noise = torch.randn(300, 3, generator=generator, dtype=torch.float64)
        for name, strength in (("AdamW, mean", 0.5), ("IVON, mean", 2.0)):
            logits = noise + strength * torch.nn.functional.one_hot(labels, 3)
            runs[name].append(class_scores(predicted(logits, labels)))
    found = compare(runs, groups=None)
    accuracy = next(each for each in found["differences"] if each["score"] == "accuracy")
    means = {name: found["variants"][name]["accuracy"]["mean"] for name in runs}
    assert accuracy["difference"] == pytest.approx(means["IVON, mean"] - means["AdamW, mean"])
    for low, high in (accuracy["examples"], accuracy["seeds"]):
        assert 0 < low < accuracy["difference"] < high
    assert {(each["first"], each["second"]) for each in found["differences"]} == {("AdamW, mean", "IVON, mean")}


def test_reliability_adds_up_to_all_predictions() -> None:
    logits = torch.randn(500, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    prediction = predicted(logits, logits.argmax(-1))
    rows = reliability([prediction, prediction], 10)
    assert sum(row[0] for row in rows) == pytest.approx(1)
    assert all(row[2] == 1 for row in rows)
    assert sum(row[0] * row[1] for row in rows) == pytest.approx(float(prediction.confidence.mean()))


def rows_of_words(count: int, *, seed: int, labelled: bool) -> list[dict[str, str]]:
    """A text is a plant if it has more of the words below w20 than above, or just text."""
    stream = random.Random(seed)
    rows = []
    for _ in range(count):
        words = [stream.randrange(45) for _ in range(8)]
        row = {"text": " ".join(f"w{word}" for word in words)}
        low = sum(word < 20 for word in words)
        rows.append({**row, "label": "plant" if low > 4 else "stone"} if labelled else row)
    return rows


def write_rows(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "task"),
    [("bert_masked_lm", "sequence_classification"), ("llama", "causal_lm")],
    ids=["classes", "tokens"],
)
def test_the_study_runs_from_finished_runs_to_tables(
    architecture: str, task: str, tiny_checkpoint: TinyCheckpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mergekit_bayes.finetune.run import finetune
    from tests.model.builders import with_tokenizer

    base = with_tokenizer(tiny_checkpoint(architecture), tmp_path / "base", pad=True)
    labelled = task == "sequence_classification"
    files = {
        name: write_rows(tmp_path / f"{name}.jsonl", rows_of_words(count, seed=place, labelled=labelled))
        for place, (name, count) in enumerate({"train": 24, "validation": 16, "test": 20}.items())
    }
    folders = []
    for optimizer in ({"name": "adamw", "lr": 0.01}, {"name": "ivon", "lr": 0.1}):
        for seed in (0, 1):
            recipe = {
                "kind": "finetune",
                "model": {"path": str(base), "task": task},
                "adapter": {"r": 2, "target_modules": ["query"] if labelled else ["q_proj"]},
                "data": {"train": str(files["train"]), "max_length": 16},
                "optimizer": optimizer,
                "training": {"max_steps": 3, "seed": seed},
                # debiased precisions are not those that training sampled with
                **({"output": {"debias_precision": False}} if optimizer["name"] == "ivon" else {}),
            }
            folders.append(finetune(recipe, tmp_path / f"{optimizer['name']}-{seed}").folder)
    held_out = ["--validation", str(files["validation"]), "--test", str(files["test"])]
    quick = ["--samples", "2", "--bins", "5", "--vocabulary", "--device", "cpu", "--out", str(tmp_path / "out")]
    quick += ["--estimators", "fisher", "kfac"]
    study.main(["words", *map(str, folders), *held_out, *quick])
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert tables(results) in capsys.readouterr().out
    assert (tmp_path / "out" / "words.png").stat().st_size > 10_000
    found = results["words"]
    scaled_too = ["IVON, mean, scaled"] if labelled else []
    sampled = [f"IVON, samples, {name}" for name in ("posterior", "as trained", "chosen")]
    assert [name for name in found["variants"] if name.startswith("IVON")] == ["IVON, mean", *scaled_too, *sampled]
    passes = ["AdamW, samples, fisher", "AdamW, samples, kfac"]
    assert [name for name in found["variants"] if name.startswith("AdamW, samples")] == passes
    priors = [run["temperatures"] for run in found["runs"] if run["optimizer"] == "adamw"]
    assert all({"prior of fisher", "prior of kfac"} <= used.keys() for used in priors)
    assert len(found["variants"]["IVON, mean"]["nll"]["values"]) == 2
    assert found["units"]["test"] == (20 if labelled else 20 * 8)  # words after the first, and the end of the text
    report = json.loads((folders[0] / "finetune_report.json").read_text())
    assert found["optimizers"]["adamw"] == report["recipe"]["optimizer"]
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text()
    with pytest.raises(SystemExit, match="expected one run of each optimizer per seed"):
        study.main(["words", *map(str, folders[:3]), *held_out, *quick])


@pytest.mark.skipif(not (PAGE / "results.json").exists(), reason="no results are committed yet")
def test_the_page_shows_the_committed_results() -> None:
    results = json.loads((PAGE / "results.json").read_text())
    page = (PAGE / "README.md").read_text()
    assert [table for table in tables(results).split("\n\n") if table not in page] == []
