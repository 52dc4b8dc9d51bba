"""A run from its recipe to its folder: what is there, what loads, what merges take, what is said."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergekit_bayes.checkpoint.sidecar import open_sidecar
from mergekit_bayes.errors import DataError, FinetuneError, MergekitBayesError, OutputError, RecipeError
from mergekit_bayes.finetune.run import FinetuneResult, finetune
from mergekit_bayes.model import environment
from mergekit_bayes.recipe import load_recipe
from tests.finetune.runs import TABLES, log_of, recipe, run, same_tensors, tensors_of

Finished = tuple[FinetuneResult, dict[str, Any]]


@pytest.fixture(scope="module")
def lora(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """An IVON-LoRA run over three and a third epochs, with everything switched on that leaves a trace."""
    content = recipe(llama, training={"max_steps": 20, "eval_steps": 8, "save_steps": 6, "save_total_limit": 2})
    return run(content, tmp_path_factory.mktemp("runs") / "lora"), content


# What is there


def test_the_folder_holds_everything_and_nothing_else(lora: Finished) -> None:
    folder = lora[0].folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "checkpoints",
        "finetune_recipe.yaml",
        "finetune_report.json",
        "log.jsonl",
        "loss.png",
        "precision.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["checkpoint-18", "checkpoint-20"]
    assert [path.name for path in folder.parent.iterdir()] == ["lora"]


def test_the_adapter_loads_and_does_better_than_the_base(lora: Finished, llama: Path) -> None:
    import peft
    import transformers

    from mergekit_bayes.data import collate

    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    tokenizer = transformers.AutoTokenizer.from_pretrained(lora[0].folder)
    rows = [{"input_ids": (ids := tokenizer(row["text"])["input_ids"]), "labels": ids} for row in TABLES["texts"]]
    batch = collate(rows, pad_token_id=0, task="causal_lm")  # type: ignore[arg-type]  # rows enough for it
    with torch.no_grad():
        before = base(**batch).loss.item()
        after = peft.PeftModel.from_pretrained(base, lora[0].folder)(**batch).loss.item()
    assert after < before


def test_the_sidecar_says_what_its_numbers_mean(lora: Finished) -> None:
    folder, report = lora[0].folder, lora[0].report
    metadata = open_sidecar(folder).metadata
    assert metadata.estimator == "ivon"
    assert metadata.loss_unit == "token"
    # twenty steps of four rows are more than the 24 rows of an epoch: N counts the epoch once
    assert metadata.num_examples == report["units"]["in_data"] < report["units"]["seen"]
    assert metadata.ess == report["optimizer"]["start"]["ess"] == report["units"]["seen"]
    assert metadata.hess_init == report["optimizer"]["start"]["hess_init"]
    assert metadata.beta2 == report["optimizer"]["start"]["beta2"]
    assert metadata.steps == 20
    assert metadata.debiased
    assert metadata.space == "factor"
    assert metadata.adapter_scaling == 2.0
    assert load_file(folder / "precision.safetensors").keys() == load_file(folder / "adapter_model.safetensors").keys()


def test_a_run_of_less_than_an_epoch_counts_what_it_saw(llama: Path, tmp_path: Path) -> None:
    result = run(recipe(llama, training={"max_steps": 2}), tmp_path / "out")
    assert open_sidecar(result.folder).metadata.num_examples == result.report["units"]["seen"]
    assert result.report["units"]["seen"] < result.report["units"]["in_data"]


def test_the_raw_curvature_can_be_exported(llama: Path, tmp_path: Path) -> None:
    output = {"debias_precision": False, "precision": "bfloat16"}
    result = run(recipe(llama, output=output), tmp_path / "out")
    assert not open_sidecar(result.folder).metadata.debiased
    assert {t.dtype for t in load_file(result.folder / "precision.safetensors").values()} == {torch.bfloat16}
    without = run(recipe(llama, output={"precision": False}), tmp_path / "without")
    assert not (without.folder / "precision.safetensors").exists()
    assert without.report["precision"] is None


def test_merges_take_the_folder_as_a_source(lora: Finished, llama: Path, tmp_path: Path) -> None:
    from mergekit_bayes import merge

    content = {
        "merge_method": "posterior",
        "base_model": str(llama),
        "models": [{"model": str(lora[0].folder), "parameters": {"weight": 1.0}}],
        "precision": {"prior": 1e-3},
        "space": "factor",
    }
    merged = merge(content, tmp_path / "merged")
    left = load_file(merged.folder / "adapter_model.safetensors")
    right = load_file(lora[0].folder / "adapter_model.safetensors")
    name = next(name for name in left if "lora_A" in name)
    torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-6)


def test_the_recipe_that_was_written_is_the_one_that_ran(lora: Finished, tmp_path: Path) -> None:
    result, content = lora
    written = load_recipe(result.folder / "finetune_recipe.yaml", methods=())
    assert written.resolved() == load_recipe(content, methods=()).resolved() == result.report["recipe"]


def test_the_log_has_every_row(lora: Finished) -> None:
    rows = log_of(lora[0].folder)
    assert [row["step"] for row in rows if "loss" in row] == list(range(2, 21, 2))
    assert [row["step"] for row in rows if "eval" in row] == [8, 16, 20]
    for row in rows:
        if "eval" in row:
            scores = row["eval"]["other texts"]
            assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
        else:
            assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "seconds_left"} <= row.keys()
            assert row["ivon"].keys() == {
                "noise_to_weight", "moved", "clipped", "noise_to_progress", "hess_init_share",
            }  # fmt: skip
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < losses[0]


def test_the_report_has_what_it_takes_to_repeat_the_run(lora: Finished) -> None:
    report = json.loads((lora[0].folder / "finetune_report.json").read_text())
    assert report == lora[0].report
    assert report["seeds"] == {"seed": 0, "data_seed": 0}
    assert {"mergekit-bayes", "torch", "transformers", "peft", "accelerate"} <= report["versions"].keys()
    assert report["evaluation"]["other texts"]["units"] == lora[0].report["evaluation"]["other texts"]["units"]
    assert report["data"]["report"]["datasets"][0]["rows"] == 24
    assert report["peak_memory"]["process"] > 1e6
    assert report["seconds"]["training"] > 0
    assert report["tokens_per_second"] > 0
    assert report["length"] == {
        "steps": 20,
        "skipped": 0,
        "epochs": pytest.approx(20 / 6),
        "global_batch": 4,
        "processes": 1,
    }


def test_the_card_is_readable_and_complete(lora: Finished) -> None:
    card = (lora[0].folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    for text in (
        "IVON",
        "| other texts |",
        "![Loss during training](loss.png)",
        "max_steps: 20",
        "`bayes-merge` takes",
    ):
        assert text in card
    assert not re.search(r"\bNone\b|\{|\}\}", card.split("## Recipe")[0])


def test_the_summary_fits_a_terminal(lora: Finished) -> None:
    text = lora[0].summary()
    assert "LoRA adapter trained for 20 steps" in text
    assert "other texts:" in text
    assert max(map(len, text.splitlines())) < 200


def test_equal_recipes_give_equal_tensors(lora: Finished, tmp_path: Path) -> None:
    again = run(lora[1], tmp_path / "again")
    assert same_tensors(lora[0].folder, again.folder)


def test_another_seed_gives_other_weights(lora: Finished, tmp_path: Path) -> None:
    content = {**lora[1], "training": {**lora[1]["training"], "seed": 1}}
    assert not same_tensors(lora[0].folder, run(content, tmp_path / "other").folder)


# Kinds of runs


def test_micro_batches_do_not_change_what_is_learned(llama: Path, tmp_path: Path) -> None:
    found = []
    for size, count in ((8, 1), (4, 2), (1, 8)):
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count, "max_steps": 4}
        result = run(recipe(llama, training=cut), tmp_path / f"{count}")
        found.append({key: t for key, t in tensors_of(result.folder).items() if "checkpoints" not in key})
    for other in found[1:]:
        for name, tensor in found[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-6 * float(tensor.abs().max()))


def test_a_classifier(bert: Path, tmp_path: Path) -> None:
    import peft
    import transformers

    optimizer = {"name": "adamw", "lr": 0.02}
    content = {**recipe(bert, task="sequence_classification", training={"max_steps": 60}), "optimizer": optimizer}
    result = run(content, tmp_path / "out")
    scores = result.report["evaluation"]["other labelled"]
    assert scores.keys() == {"loss", "accuracy", "ece", "units"}
    assert scores["accuracy"] > 0.5
    base = transformers.AutoModelForSequenceClassification.from_pretrained(bert, num_labels=3)
    peft.PeftModel.from_pretrained(base, result.folder)


def test_a_classifier_has_a_posterior_over_examples(bert: Path, tmp_path: Path) -> None:
    content = recipe(bert, task="sequence_classification", optimizer={"lr": 0.1})
    result = run(content, tmp_path / "out")
    assert open_sidecar(result.folder).metadata.loss_unit == "example"
    assert open_sidecar(result.folder).metadata.num_examples == 24
    assert (result.folder / "README.md").read_text().count("examples") >= 2


def test_full_fine_tuning(llama: Path, tmp_path: Path) -> None:
    import transformers

    result = run(recipe(llama, adapter=None, optimizer={"lr": 1.0}), tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(result.folder)
    assert model.config.use_cache
    assert not result.report["trained"]["adapter"]
    metadata = open_sidecar(result.folder).metadata
    assert metadata.space == "full"
    precisions = load_file(result.folder / "precision.safetensors")
    assert precisions.keys() == load_file(result.folder / "model.safetensors").keys()
    assert "All weights" in (result.folder / "README.md").read_text()


def test_adamw_leaves_no_sidecar(llama: Path, tmp_path: Path) -> None:
    content = {**recipe(llama, training={"max_steps": 12}), "optimizer": {"name": "adamw", "lr": 0.02}}
    result = run(content, tmp_path / "out")
    assert not (result.folder / "precision.safetensors").exists()
    losses = [row["loss"] for row in log_of(result.folder) if "loss" in row]
    assert losses[-1] < losses[0]
    assert "ivon" not in log_of(result.folder)[0]


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantised_bases_are_trained_on_the_cpu(llama: Path, tmp_path: Path, bits: str) -> None:
    result = run(recipe(llama, model={bits: True}, training={"max_steps": 20}), tmp_path / "out")
    losses = [row["loss"] for row in log_of(result.folder) if "loss" in row]
    assert losses[-1] < losses[0]
    assert (result.folder / "precision.safetensors").exists()


@pytest.mark.parametrize(
    "training",
    [
        {"bf16": True},
        {"fp16": True},
        {"gradient_checkpointing": True},
        {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": 0.5},
        {"dataloader_num_workers": 1},
        {"max_grad_norm": 0},
    ],
)
def test_options_of_training_work(llama: Path, tmp_path: Path, training: dict[str, Any]) -> None:
    result = run(recipe(llama, training={"max_steps": 3, "logging_steps": 1, **training}), tmp_path / "out")
    assert [row["step"] for row in log_of(result.folder) if "loss" in row] == [1, 2, 3]


def test_packed_rows_are_learned(llama: Path, tmp_path: Path) -> None:
    data = {"packing": True, "max_length": 16}
    result = run(recipe(llama, data=data), tmp_path / "out")
    assert result.report["data"]["report"]["datasets"][0]["segments"] >= 24


@pytest.mark.parametrize("noise", ["shared", "per_process"])
def test_one_process_has_one_noise(llama: Path, tmp_path: Path, noise: str) -> None:
    options = {"noise": noise, "mc_samples": 2, "antithetic": True}
    result = run(recipe(llama, optimizer=options), tmp_path / "out")
    assert (result.folder / "precision.safetensors").exists()


# What is said


def test_a_sidecar_without_curvature_says_so(llama: Path, tmp_path: Path) -> None:
    options = {"ess": 1e6, "hess_init": 0.01, "beta2": 0.99999, "temperature": None, "noise_to_weight": None}
    result = run(recipe(llama, optimizer=options), tmp_path / "out")
    (note,) = result.report["notes"]
    for text in ("almost no curvature", "`precision` pass", "smaller optimizer.ess", "larger 1 - beta2"):
        assert text in note
    assert note in (result.folder / "README.md").read_text()
    assert "note: The precision carries almost no curvature" in result.summary()


def test_starting_values_and_data_are_shown(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(recipe(llama), tmp_path / "out", progress=True)
    shown = capsys.readouterr().err
    assert re.search(r"IVON starts with ess \d+ \(derived\), hess_init [\d.e-]+ \(derived\), beta2", shown)
    assert "noise is 0.02 of the weights" in shown
    assert "texts (train, text): 24 rows" in shown
    assert re.search(r"step 6/6  loss [\d.]+  lr [\d.e-]+  [\d,]+ tokens/s  \d+ s left", shown)
    assert "step 6/6  other texts: loss" in shown


def test_a_quiet_run_says_nothing(llama: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(recipe(llama, training={"max_steps": 1}), tmp_path / "out")
    assert capfd.readouterr() == ("", "")


# What is refused


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c["training"].update(report_to=["wandb"]), FinetuneError, "no tracker wandb here; installed are"),
        (lambda c: c["training"].update(lr_scheduler_kwargs={"min_lr_rate": 0.1}), MergekitBayesError, "lr_scheduler"),
        (lambda c: c["data"].update(train="nowhere.jsonl"), DataError, "nowhere.jsonl"),
        (lambda c: c["model"].update(path="no/such/base"), MergekitBayesError, "no/such/base"),
        (lambda c: c["training"].update(resume_from_checkpoint="gone"), FinetuneError, "no folder gone; looked at"),
        (lambda c: c["optimizer"].update(weight_decay=1e6), FinetuneError, "noise_to_weight is 0.02; weight_decay"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing(
    llama: Path, tmp_path: Path, change: Callable[[Any], None], error: type[MergekitBayesError], message: str
) -> None:
    content = recipe(llama)
    change(content)
    with pytest.raises(error, match=re.escape(message)):
        run(content, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_row_longer_than_the_model_has_positions_for_is_refused(bert: Path, tmp_path: Path) -> None:
    content = recipe(bert, task="sequence_classification", data={"max_length": 100})
    tables = {name: [{"text": "w1 " * 60 + row["text"], "label": row["label"]} for row in rows]
              for name, rows in TABLES.items() if "labelled" in name}  # fmt: skip
    with pytest.raises(FinetuneError, match=r"data\.max_length: the longest row has 63 tokens, .* has places for 32"):
        finetune(content, tmp_path / "out", tables=tables)


def test_an_output_is_needed_and_may_not_exist(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"output\.path: missing"):
        finetune(recipe(llama))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        run(recipe(llama), tmp_path / "out")
    assert (tmp_path / "out" / "precious").read_text() == "mine"
    run(recipe(llama, training={"max_steps": 1}), tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "precious").exists()


def test_an_input_may_not_be_the_output(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="input"):
        run(recipe(llama), llama, overwrite=True)


def test_a_recipe_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="expected a recipe of kind `finetune`, found `merge`"):
        finetune({"merge_method": "linear", "models": [{"model": "a"}]}, tmp_path / "out")


@pytest.mark.parametrize(
    ("sections", "change"),
    [
        ({"model": {"dtype": "bfloat16"}}, "`model.dtype: float32` would take less time"),
        ({"training": {"max_steps": 1, "bf16": True}}, "a run without `training.bf16` would take less time"),
        ({"model": {"dtype": "float32"}}, None),
    ],
)
def test_a_dtype_that_the_processor_emulates_is_told(
    sections: dict[str, dict[str, object]],
    change: str | None,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(environment, "_times_as_long", lambda _: 9.0)
    run(recipe(llama, **{"training": {"max_steps": 1}, **sections}), tmp_path / "out", progress=True)
    said = capsys.readouterr().err
    assert ("times as long" in said) is (change is not None)
    assert change is None or f"in bfloat16 as in float32; {change}\n" in said
