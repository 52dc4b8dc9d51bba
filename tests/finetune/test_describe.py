"""The plan of a run: what it says, and that it refuses everything at once what cannot work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergekit_bayes.errors import PlanError
from mergekit_bayes.finetune.describe import describe
from mergekit_bayes.recipe import FinetuneRecipe, load_recipe
from tests.finetune.runs import recipe


def loaded(content: dict[str, Any]) -> FinetuneRecipe:
    return load_recipe(content, expect=FinetuneRecipe)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "w1 w2"}\n')
    return path


def test_a_plan_says_what_will_happen_and_ends_in_the_recipe(llama: Path, data: Path, tmp_path: Path) -> None:
    content = recipe(
        llama,
        data={"train": [str(data), "org/corpus"], "eval": None, "eval_fraction": 0.1, "packing": True},
        training={"gradient_accumulation_steps": 2, "save_steps": 3, "save_total_limit": 2, "warmup_steps": 0.1},
    )
    text = describe(loaded({**content, "output": {"path": str(tmp_path / "out")}}))
    plan, _, resolved = text.partition("\n\n")
    assert plan.splitlines() == [
        f"model   {llama}: 5,456 weights stored as F32, for causal_lm",
        "        a LoRA adapter of rank 4 on all-linear is trained",
        f"data    train: {data}",
        "        train: org/corpus (hub), split train",
        "        eval: 0.1 of the training rows",
        "        rows of at most 1024 tokens, packed; longer ones: truncate",
        "train   6 steps of 8 rows per process in 2 micro-batches, lr 10 linear, warm-up 0.1",
        "        IVON: ess, hess_init, beta2 from the run, temperature 1 and noise of 0.02 of the weights",
        f"output  {tmp_path / 'out'}: adapter, precisions in float32, recipe, log, loss curve, report",
        "        checkpoints every 3 steps and at the end, the newest 2 kept",
    ]
    assert resolved.startswith("kind: finetune\n")
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_hub_model_is_not_fetched_for_a_plan(data: Path) -> None:
    content = recipe(Path("org/model"), data={"train": str(data), "eval": None}, adapter=None)
    plan = describe(loaded({**content, "optimizer": "adamw"}))
    assert "org/model: of the hub, for causal_lm\n        all weights are trained\n" in plan
    assert "AdamW: leaves no precision behind" in plan


def test_an_output_that_exists_is_mentioned(llama: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    content = recipe(llama, data={"train": str(data), "eval": None}, adapter=None)
    text = describe(loaded({**content, "output": {"path": str(tmp_path / "out")}}))
    assert "out (exists; replaced only with --overwrite): model" in text
    assert "all weights are trained: 109,120 bytes (109.1 kB) with gradients and optimizer" in text


def test_all_that_cannot_work_comes_at_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    content = recipe(
        tmp_path / "empty",
        data={"train": ["gone.jsonl", "lost.jsonl"], "eval": None},
        training={"report_to": ["wandb"]},
        output={"path": str(tmp_path / "empty" / "out")},
    )
    with pytest.raises(PlanError) as caught:
        describe(loaded(content))
    text = str(caught.value)
    for part in ("empty", "gone.jsonl", "lost.jsonl", "no tracker wandb", "the output folder lies inside an input"):
        assert part in text
