"""Previews of tiny adapters: what is evaluated is what a merge makes, and nothing is evaluated twice."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergekit_bayes import merge
from mergekit_bayes.errors import OutputError, PlanError, RecipeError
from mergekit_bayes.merge.schemas import method_schemas
from mergekit_bayes.preview.run import PreviewResult, preview
from mergekit_bayes.recipe import load_recipe
from mergekit_bayes.recipe.preview import PreviewRecipe
from tests.preview.conftest import TABLES, Recipes


def run(content: dict[str, Any], out: Path, **options: Any) -> PreviewResult:
    return preview(content, out, tables=TABLES, **options)


def losses(folder: Path, base: Path, *, adapter: bool) -> list[float]:
    """Loss of a merged model on every task, by transformers and PEFT alone."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base if adapter else folder, dtype=torch.float32)
    if adapter:
        model = peft.PeftModel.from_pretrained(model, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    found = []
    for table in TABLES.values():
        total, count = 0.0, 0
        for row in table:
            ids = torch.tensor([tokenizer(row["text"])["input_ids"] + [tokenizer.eos_token_id]])
            with torch.no_grad():
                logits = model.eval()(input_ids=ids).logits[0, :-1].double()
            total -= float(logits.log_softmax(-1).gather(1, ids[0, 1:, None]).sum())
            count += ids.shape[1] - 1
        found.append(total / count)
    return found


METHODS: list[Any] = [
    "task_arithmetic",
    {"merge_method": "linear", "name": "soup"},
    {"merge_method": "posterior", "name": "dense", "space": "full"},
    {"merge_method": "posterior", "name": "product", "space": "product"},
    {"merge_method": "ties", "space": "full", "parameters": {"density": 0.5}},
]


def test_every_method_scores_what_its_merge_scores(recipe: Recipes, llama: Path, tmp_path: Path) -> None:
    content = recipe(sources=3, methods=METHODS, design=[[0.2, 0.3, 0.5], [0.6, 0.4, 0.0]], fidelity="evaluated")
    result = run(content, tmp_path / "out")
    loaded = load_recipe(content, expect=PreviewRecipe, methods=method_schemas())
    points = {(point["method"], tuple(point["weights"])): point for point in result.front["points"]}
    for index, method in enumerate(loaded.compared):
        target = tmp_path / f"merged{index}"
        merge(loaded.merge_of(method, (0.2, 0.3, 0.5)), target)
        expected = losses(target, llama, adapter=method.space != "full")
        found = list(points[method.title, (0.2, 0.3, 0.5)]["evaluated"]["scores"].values())
        assert np.allclose(found, expected, atol=1e-5), method.title


def test_base_and_experts_are_the_models_themselves(
    recipe: Recipes, llama: Path, adapters: list[Path], tmp_path: Path
) -> None:
    front = run(recipe(sources=3, design=[[1, 1, 1]], fidelity="evaluated"), tmp_path / "out").front
    assert np.allclose(list(front["base"].values()), losses(llama, llama, adapter=False), atol=1e-5)
    for adapter in adapters:
        assert np.allclose(
            list(front["experts"][str(adapter)].values()), losses(adapter, llama, adapter=True), atol=1e-5
        )


def test_what_is_written(recipe: Recipes, tmp_path: Path) -> None:
    result = run(recipe(methods=["task_arithmetic", "posterior"]), tmp_path / "out")
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "evaluations.jsonl",
        "front.json",
        "front.png",
        "front.svg",
        "points.csv",
        "preview_recipe.yaml",
    ]
    front = json.loads((out / "front.json").read_text())
    assert front == json.loads(json.dumps(result.front))
    assert front["complete"] is True
    assert {tier: measures["points"] for tier, measures in front["tiers"].items()} == {"evaluated": 10, "surrogate": 10}
    rows = list(csv.DictReader((out / "points.csv").read_text().splitlines()))
    assert len(rows) == 10
    assert float(rows[0]["evaluated_t1"]) == front["points"][0]["evaluated"]["scores"]["t1"]
    for tier in front["tiers"]:
        for point in front["points"]:
            gains = np.array(list(point[tier]["normalised"].values()))
            others = [np.array(list(other[tier]["normalised"].values())) for other in front["points"]]
            beaten = any((other >= gains).all() and (other > gains).any() for other in others)
            assert point[tier]["dominated"] is beaten
    assert "hypervolume" in result.summary()


def test_the_surrogate_alone_needs_no_data_and_is_exact_at_the_experts(recipe: Recipes, tmp_path: Path) -> None:
    content = recipe(
        sources=3, tasks=[{}, {}, {}], fidelity="surrogate", methods=["task_arithmetic", "posterior", "ties"]
    )
    front = run(content, tmp_path / "out").front
    for point in front["points"]:
        for expert, task in enumerate(front["tasks"]):
            if point["weights"][expert] == 1.0 and point["method"] != "ties":
                assert point["surrogate"]["normalised"][task["name"]] == pytest.approx(1.0, abs=1e-5)
    assert front["surrogate"]["methods"]["ties"]["form"] == "other"
    assert (tmp_path / "out" / "front.png").stat().st_size > 1000


def test_the_surrogate_of_one_mix_is_the_mismatch_that_its_merge_reports(recipe: Recipes, tmp_path: Path) -> None:
    content = recipe(sources=3, methods=[{"merge_method": "posterior", "space": "full"}], design=[[0.2, 0.3, 0.5]])
    content |= {"fidelity": "surrogate", "scale": "sum"}
    front = run(content, tmp_path / "out").front
    loaded = load_recipe(content, expect=PreviewRecipe, methods=method_schemas())
    report = merge(loaded.merge_of(loaded.compared[0], (0.2, 0.3, 0.5)), tmp_path / "merged").report
    expected = [report["mismatch"][source.model]["total"] for source in loaded.models]
    assert np.allclose(list(front["points"][0]["surrogate"]["scores"].values()), expected, rtol=1e-4)


def test_a_stopped_sweep_continues_and_a_wider_one_adds(
    recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_bayes.preview.evaluators import Evaluations

    content = recipe(fidelity="evaluated", methods=["task_arithmetic", "posterior"])
    whole = run(content, tmp_path / "whole").front
    evaluated: list[str] = []
    evaluate = Evaluations.evaluate

    def interrupting(self: Evaluations, method: Any, mixes: Any) -> Any:
        if len(evaluated) == 3:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)
        evaluated.append(method.title)
        return evaluate(self, method, mixes)

    monkeypatch.setattr(Evaluations, "evaluate", interrupting)
    with pytest.raises(KeyboardInterrupt, match="results so far"):
        run(content, tmp_path / "cut")
    partial = json.loads((tmp_path / "cut" / "front.json").read_text())
    assert partial["complete"] is False
    assert any("were not evaluated" in note for note in partial["notes"])
    done = len(evaluated)
    monkeypatch.setattr(Evaluations, "evaluate", lambda *a: (evaluated.append(""), evaluate(*a))[1])
    again = run(content, tmp_path / "cut").front
    strip = lambda front: [{k: v for k, v in p.items() if k != "seconds"} for p in front["points"]]  # noqa: E731
    assert strip(again) == strip(whole)
    assert again["complete"] is True
    total = len(evaluated)
    assert run(content, tmp_path / "cut").front["points"] == again["points"]
    assert len(evaluated) == total > done
    wider = run({**content, "design": {"partitions": 8}}, tmp_path / "cut").front
    assert wider["tiers"]["evaluated"]["points"] == 18
    by_place = {(p["method"], tuple(p["weights"])): p["evaluated"]["scores"] for p in wider["points"]}
    for point in whole["points"]:
        found = by_place[point["method"], tuple(point["weights"])]
        assert found == pytest.approx(point["evaluated"]["scores"], abs=1e-5)


def test_a_torn_line_of_the_cache_is_passed_over(recipe: Recipes, tmp_path: Path) -> None:
    content = recipe(fidelity="evaluated")
    first = run(content, tmp_path / "out").front
    cache = tmp_path / "out" / "evaluations.jsonl"
    cache.write_bytes(cache.read_bytes()[:-40])
    again = run(content, tmp_path / "out").front
    assert [p["evaluated"]["scores"] for p in again["points"]] == [
        pytest.approx(p["evaluated"]["scores"], abs=1e-6) for p in first["points"]
    ]


def test_a_budget_keeps_what_covers_the_design_and_says_what_it_skips(recipe: Recipes, tmp_path: Path) -> None:
    content = recipe(methods=["task_arithmetic", "posterior"], budget={"points": 6}, fidelity="evaluated")
    front = run(content, tmp_path / "out").front
    for method in front["methods"]:
        weights = [p["weights"] for p in front["points"] if p["method"] == method and "evaluated" in p]
        assert sorted(weights) == [[0.0, 1.0], [0.5, 0.5], [1.0, 0.0]]
    assert front["skipped"] == 4
    assert any("4 mixes of the design were not evaluated" in note for note in front["notes"])


def test_minutes_end_a_sweep_that_says_what_it_skipped_and_goes_on(
    recipe: Recipes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_bayes.preview import evaluation
    from mergekit_bayes.preview.evaluators import Evaluations

    minutes = [0.0]
    evaluate = Evaluations.evaluate

    def slow(self: Evaluations, method: Any, mixes: Any) -> Any:
        minutes[0] += len(mixes)  # every mix takes a minute of this clock
        return evaluate(self, method, mixes)

    monkeypatch.setattr(Evaluations, "evaluate", slow)
    monkeypatch.setattr(evaluation, "monotonic", lambda: 60 * minutes[0])
    content = recipe(
        methods=["task_arithmetic", "posterior"],
        evaluation={"mixes_per_batch": 1},
        budget={"minutes": 5.5},
        fidelity="evaluated",
    )
    front = run(content, tmp_path / "out").front
    # base and experts take three minutes, and three mixes are begun before the time is over, the methods in turn
    done = [(p["method"], p["weights"]) for p in front["points"] if "evaluated" in p and 1.0 not in p["weights"]]
    assert done == [("task_arithmetic", [0.5, 0.5]), ("posterior", [0.5, 0.5])]
    assert minutes[0] == 6
    skipped = sum("evaluated" not in point for point in front["points"])
    assert (front["complete"], front["skipped"]) == (False, skipped)
    reason = f"{skipped} of them because `budget.minutes: 5.5` was over"
    assert any(f"{skipped} mixes of the design were not evaluated, {reason}" in note for note in front["notes"])
    again = run({**content, "budget": {"minutes": 60}}, tmp_path / "out").front
    assert (again["complete"], minutes[0]) == (True, 6 + skipped)
    assert len(again["points"]) == sum("evaluated" in point for point in again["points"])


def test_an_adaptive_design_spends_its_budget_where_the_front_grows(recipe: Recipes, tmp_path: Path) -> None:
    content = recipe(
        methods=["task_arithmetic", "posterior"],
        design={"partitions": 20, "adaptive": True},
        budget={"points": 24},
        fidelity="evaluated",
    )
    front = run(content, tmp_path / "out").front
    per_method = [
        sum(p["method"] == method and "evaluated" in p for p in front["points"]) for method in front["methods"]
    ]
    assert sum(per_method) == 24
    assert min(per_method) >= 11
    assert front["complete"] is True
    lines = (tmp_path / "out" / "evaluations.jsonl").read_text().count('"key"')
    again = run(content, tmp_path / "out").front
    assert again["points"] == front["points"]
    assert (tmp_path / "out" / "evaluations.jsonl").read_text().count('"key"') == lines


def test_an_evaluator_that_fails_and_one_that_is_no_number(recipe: Recipes, tmp_path: Path) -> None:
    seen: list[int] = []

    def sometimes(model: torch.nn.Module) -> float:
        seen.append(0)
        if len(seen) == 5:
            raise ValueError("out of luck")
        return math.nan if len(seen) == 6 else float(next(model.parameters()).double().square().mean())

    content = recipe(fidelity="evaluated")
    front = run(content, tmp_path / "out", evaluators={"t1": sometimes}).front
    failed = [point for point in front["points"] if "error" in point]
    assert [point["error"] for point in failed] == ["ValueError: out of luck"]
    assert any("1 mixes could not be evaluated" in note and "out of luck" in note for note in front["notes"])
    assert any("1 evaluated mixes have a score that is no number" in note for note in front["notes"])
    assert front["tiers"]["evaluated"]["points"] == 5
    assert front["tiers"]["evaluated"]["not_a_number"] == 5  # t1 scores the same for every model: it has no scale
    with pytest.raises(RecipeError, match="evaluators: other is no task"):
        run(content, tmp_path / "other", evaluators={"other": sometimes})


def test_classifiers_are_judged_by_accuracy(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Any
) -> None:
    from tests.model.builders import with_tokenizer

    base, *tuned = (
        with_tokenizer(tiny_checkpoint("bert", **options), tmp_path / name, pad=True)
        for name, options in (("base", {}), ("x", {"seed": 1, "drift": 0.1}), ("y", {"seed": 2, "drift": 0.1}))
    )
    rows = [{"text": f"w{row % 7} w{row % 5}", "label": ("a", "b", "c")[row % 3]} for row in range(12)]
    content = {
        "kind": "preview",
        "base_model": str(base),
        "models": [{"model": str(folder)} for folder in tuned],
        "methods": ["task_arithmetic"],
        "tasks": [
            {"name": "x", "metric": "accuracy", "data": {"eval": "rows", "labels": ["a", "b", "c"]}},
            {"name": "y", "metric": "loss", "data": {"eval": "rows", "labels": ["a", "b", "c"]}},
        ],
        "design": [[0.5, 0.5]],
        "fidelity": "evaluated",
        "evaluation": {"task": "sequence_classification"},
    }
    front = preview(content, tmp_path / "out", tables={"rows": rows}).front
    (point,) = front["points"]
    assert "error" not in point
    assert 0 <= point["evaluated"]["scores"]["x"] <= 1
    assert [task["better"] for task in front["tasks"]] == ["higher", "lower"]


def test_what_is_refused(recipe: Recipes, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"output.path: missing"):
        preview(recipe(), tables=TABLES)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"holds thesis\.tex and no preview"):
        run(recipe(), tmp_path / "full")
    bare = recipe(methods=["gradient_matching", "task_arithmetic"], fidelity="evaluated")
    bare["models"] = [{"model": each["model"]} for each in bare["models"]]
    with pytest.raises(PlanError, match="gradient_matching"):
        run(bare, tmp_path / "out")
    assert not (tmp_path / "out").exists()
