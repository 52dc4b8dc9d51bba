"""Runs that were cut short: what is kept, what continues to the same bytes, what is refused and in which words."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_bayes.checkpoint.sidecar import open_sidecar
from mergekit_bayes.errors import CheckpointError, FinetuneError, OutputError
from mergekit_bayes.finetune import step as step_module
from mergekit_bayes.finetune.checkpoints import load_checkpoint
from mergekit_bayes.finetune.step import Stepper, StepResult
from tests.finetune.runs import log_of, recipe, run, same_tensors, tensors_of

TRAINING = {"max_steps": 12, "save_steps": 4, "logging_steps": 1}


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    return run(recipe(llama, training=TRAINING), tmp_path_factory.mktemp("whole") / "out").folder


def stopped(content: dict[str, Any], out: Path, *, after: int, number: int = signal.SIGINT, **options: Any) -> str:
    """Starts a run and sends it a signal during a step; returns what it said."""
    taken = 0
    original = Stepper.step

    def step(self: Stepper, *arguments: Any, **keywords: Any) -> StepResult:
        nonlocal taken
        taken += 1
        if taken == after:
            os.kill(os.getpid(), number)
        return original(self, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "step", step)
        with pytest.raises(KeyboardInterrupt) as caught:
            run(content, out, **options)
    return str(caught.value)


def kept(out: Path) -> list[str]:
    """Checkpoints of an unfinished run."""
    folder = out.parent / f".{out.name}.partial" / "staging" / "checkpoints"
    return sorted(path.name for path in folder.iterdir())


# Going on


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_same_call_continues(
    llama: Path, whole: Path, tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    content, out = recipe(llama, training=TRAINING), tmp_path / "out"
    said = stopped(content, out, after=6, number=number)
    assert said.startswith(f"stopped by {signal.Signals(number).name} after step 6 of 12; ")
    assert said.endswith("checkpoint-6 is saved, and the same command continues from it")
    assert not out.exists()
    assert kept(out) == ["checkpoint-4", "checkpoint-6"]
    run(content, out, progress=True)
    assert "continues from checkpoint-6" in capsys.readouterr().err
    shutil.rmtree(out / "checkpoints" / "checkpoint-6")
    assert same_tensors(out, whole)
    assert [row["step"] for row in log_of(out)] == [row["step"] for row in log_of(whole)]
    assert [row.get("loss") for row in log_of(out)] == [row.get("loss") for row in log_of(whole)]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": {"mc_samples": 2, "antithetic": True}},
        {"adapter": {"lora_dropout": 0.3}, "training": {"gradient_accumulation_steps": 2}},
        {"adapter": None, "optimizer": {"lr": 1.0, "weight_decay": 0.1, "clip_radius": 0.01}},
        {"training": {"fp16": True}},
        {"adamw": True, "adapter": {"lora_dropout": 0.3}},
    ],
    ids=["samples", "dropout", "full", "fp16", "adamw"],
)
def test_every_kind_of_run_continues_to_the_same_bits(llama: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    adamw = options.pop("adamw", False)
    content = recipe(llama, **{**options, "training": {"max_steps": 5, **options.get("training", {})}})
    if adamw:
        content["optimizer"] = {"name": "adamw", "lr": 0.01}
        options["adamw"] = True  # the parameters of a test are shared
    stopped(content, tmp_path / "cut", after=3)
    cut, straight = run(content, tmp_path / "cut").folder, run(content, tmp_path / "straight").folder
    shutil.rmtree(cut / "checkpoints" / "checkpoint-3")
    assert same_tensors(cut, straight)


def test_a_run_that_is_stopped_twice_continues_twice(llama: Path, whole: Path, tmp_path: Path) -> None:
    content, out = recipe(llama, training=TRAINING), tmp_path / "out"
    stopped(content, out, after=5)
    assert "after step 7 of 12" in stopped(content, out, after=2)
    run(content, out)
    for step in (5, 7):
        shutil.rmtree(out / "checkpoints" / f"checkpoint-{step}")
    assert same_tensors(out, whole)


def test_a_damaged_checkpoint_is_passed_over(
    llama: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, out = recipe(llama, training=TRAINING), tmp_path / "out"
    stopped(content, out, after=6)
    file = tmp_path / ".out.partial" / "staging" / "checkpoints" / "checkpoint-6" / "optimizer.safetensors"
    content_of = bytearray(file.read_bytes())
    content_of[-3] ^= 4
    file.write_bytes(content_of)
    run(content, out, progress=True)
    shown = capsys.readouterr().err
    assert re.search(r"passed over: .*optimizer\.safetensors: is missing or damaged", shown)
    assert "continues from checkpoint-4" in shown
    assert same_tensors(out, whole)


def test_checkpoints_none_of_which_can_be_read_are_not_thrown_away(llama: Path, tmp_path: Path) -> None:
    content, out = recipe(llama, training={**TRAINING, "save_steps": None}), tmp_path / "out"
    stopped(content, out, after=6)
    marker = tmp_path / ".out.partial" / "staging" / "checkpoints" / "checkpoint-6" / "checkpoint.json"
    text = marker.read_text()
    marker.write_text(text.replace('"version": 1\n', '"version": 2\n'))
    with pytest.raises(CheckpointError, match=r"no checkpoint of the interrupted run can be used:\n.*version 2"):
        run(content, out)
    assert kept(out) == ["checkpoint-6"]


def test_a_row_of_the_log_may_span_an_interruption(llama: Path, tmp_path: Path) -> None:
    content = recipe(llama, training={"max_steps": 10, "logging_steps": 5})
    stopped(content, tmp_path / "cut", after=3)
    rows = [log_of(run(content, tmp_path / name).folder) for name in ("cut", "straight")]
    for name in ("loss", "grad_norm", "learning_rate", "ivon"):
        assert [row.get(name) for row in rows[0]] == [row.get(name) for row in rows[1]]


def test_false_begins_anew(llama: Path, whole: Path, tmp_path: Path) -> None:
    content, out = recipe(llama, training=TRAINING), tmp_path / "out"
    stopped(recipe(llama, training={**TRAINING, "seed": 1}), out, after=6)
    content["training"]["resume_from_checkpoint"] = False
    run(content, out)
    assert same_tensors(out, whole)


def test_old_checkpoints_go_when_newer_ones_are_safe(llama: Path, tmp_path: Path) -> None:
    content = recipe(llama, training={**TRAINING, "save_steps": 2, "save_total_limit": 2})
    stopped(content, tmp_path / "out", after=9)
    assert kept(tmp_path / "out") == ["checkpoint-8", "checkpoint-9"]


# Another recipe


def test_what_changes_nothing_may_change(llama: Path, whole: Path, tmp_path: Path) -> None:
    stopped(recipe(llama, training={**TRAINING, "save_steps": 5}), tmp_path / "out", after=6)
    other = recipe(llama, training={**TRAINING, "per_device_eval_batch_size": 2, "save_total_limit": 1})
    run(other, tmp_path / "out")
    names = [name for name in tensors_of(whole) if "checkpoints" not in name]
    left, right = tensors_of(tmp_path / "out"), tensors_of(whole)
    assert all(torch.equal(left[name], right[name]) for name in names)


def test_a_changed_recipe_is_refused_and_the_difference_shown(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stopped(recipe(llama, training=TRAINING), out, after=6)
    changed = recipe(llama, training={**TRAINING, "seed": 3}, optimizer={"lr": 5.0})
    with pytest.raises(FinetuneError) as caught:
        run(changed, out)
    message = str(caught.value)
    assert message.splitlines()[0] == "checkpoint-6 of an earlier run is of another recipe:"
    assert "  optimizer.lr: was 10.0, now 5.0" in message
    assert "  training.seed: was 0, now 3" in message
    assert "--set training.resume_from_checkpoint=false" in message
    assert "name the checkpoint in training.resume_from_checkpoint" in message
    assert kept(out) == ["checkpoint-4", "checkpoint-6"]


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"adapter": {"r": 8}}, "adapter.r: was 4, now 8"),
        (
            {"training": {"per_device_train_batch_size": 8}},
            "per optimizer step, over all processes: were 4, now 8",
        ),
        ({"data": {"max_length": 4}}, "data.max_length: was 1024, now 4"),
        ({"optimizer": {"mc_samples": 2}}, "optimizer.mc_samples: was 1, now 2"),
    ],
)
def test_a_state_of_something_else_is_refused_also_by_name(
    llama: Path, whole: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    training = {**TRAINING, "resume_from_checkpoint": str(whole), **sections.get("training", {})}
    with pytest.raises(FinetuneError, match=re.escape(message)):
        run(recipe(llama, **{**sections, "training": training}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_same_rows_and_base_under_another_name_are_the_same(llama: Path, whole: Path, tmp_path: Path) -> None:
    from mergekit_bayes.finetune.run import finetune
    from tests.finetune.runs import TABLES

    shutil.copytree(llama, tmp_path / "copied base")
    content = recipe(tmp_path / "copied base", training={**TRAINING, "resume_from_checkpoint": str(whole)})
    content["data"] = {"train": "same", "eval": "other texts"}
    tables = {"same": TABLES["texts"], "other texts": TABLES["other texts"]}
    finetune(content, tmp_path / "out", tables=tables)
    left, right = tensors_of(tmp_path / "out"), tensors_of(whole)
    assert torch.equal(*(t["adapter_model.safetensors: " + next(iter(_factors(t)))] for t in (left, right)))


def _factors(tensors: dict[str, torch.Tensor]) -> list[str]:
    return [name.split(": ")[1] for name in tensors if name.startswith("adapter_model")]


def test_a_longer_run_goes_on_from_a_finished_one(
    llama: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = {**TRAINING, "max_steps": 15, "resume_from_checkpoint": str(whole)}
    result = run(recipe(llama, training=training), tmp_path / "out", progress=True)
    shown = capsys.readouterr().err
    assert "continues from checkpoint-12" in shown
    assert "changed since: training.max_steps: was 12, now 15" in shown
    assert result.report["length"]["steps"] == 15
    # ess and beta2 follow from the length of the run that began
    before = json.loads((whole / "finetune_report.json").read_text())
    assert result.report["optimizer"]["start"] == before["optimizer"]["start"]
    assert [row["step"] for row in log_of(result.folder) if "loss" in row] == list(range(1, 16))


def test_a_run_cannot_end_before_it_begins(llama: Path, whole: Path, tmp_path: Path) -> None:
    training = {**TRAINING, "max_steps": 10, "resume_from_checkpoint": str(whole)}
    with pytest.raises(FinetuneError, match="checkpoint-12 is beyond the end of this run, which has 10 steps"):
        run(recipe(llama, training=training), tmp_path / "out")


def test_another_course_from_a_named_checkpoint(llama: Path, whole: Path, tmp_path: Path) -> None:
    named = str(whole / "checkpoints" / "checkpoint-8")
    content = recipe(llama, training={**TRAINING, "resume_from_checkpoint": named}, optimizer={"lr": 1.0})
    out = tmp_path / "out"
    stopped(content, out, after=2)
    result = run(content, out)  # continues from checkpoint-10, not from the named one
    rows = [row for row in log_of(result.folder) if "loss" in row]
    assert rows[7]["learning_rate"] == log_of(whole)[7]["learning_rate"]
    assert rows[8]["learning_rate"] == pytest.approx(log_of(whole)[8]["learning_rate"] / 10)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == ["checkpoint-10", "checkpoint-12"]


def test_options_of_the_optimizer_follow_the_new_course(llama: Path, whole: Path, tmp_path: Path) -> None:
    named = str(whole / "checkpoints" / "checkpoint-4")
    changed = {"weight_decay": 0.5, "clip_radius": 1e-9, "beta1": 0.5}
    content = recipe(llama, training={**TRAINING, "resume_from_checkpoint": named}, optimizer=changed)
    result = run(content, tmp_path / "out")
    (group,) = load_checkpoint(tmp_path / "out" / "checkpoints" / "checkpoint-12").optimizer["param_groups"]
    assert {name: group[name] for name in changed} == changed
    assert result.report["precision"]["clipped"] == 1.0
    assert open_sidecar(result.folder).metadata.weight_decay == 0.5


def test_what_is_no_checkpoint_is_refused(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    training = {"resume_from_checkpoint": str(tmp_path / "empty")}
    with pytest.raises(CheckpointError, match="empty: is no checkpoint of a run"):
        run(recipe(llama, training=training), tmp_path / "out")


# Numbers and disks


@pytest.mark.parametrize("name", ["ivon", "adamw"])
def test_a_loss_that_stays_nan_ends_the_run_and_the_last_good_state_is_kept(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    content = recipe(llama, training={"max_steps": 30, "logging_steps": 1, "save_steps": 5})
    if name == "adamw":
        content["optimizer"] = {"name": "adamw", "lr": 0.01}
    calls = 0
    original = step_module.summed_loss

    def loss(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(*arguments) * (float("nan") if calls > 7 else 1.0)

    monkeypatch.setattr(step_module, "summed_loss", loss)
    with pytest.raises(FinetuneError) as caught:
        run(content, tmp_path / "out")
    message = str(caught.value)
    assert "the gradients of steps 8 to 17 were not finite" in message
    state = re.search(r"the weights after step 7 are kept in (\S+):", message)
    assert state is not None
    assert Path(state[1]).is_dir()
    assert kept(tmp_path / "out") == ["checkpoint-10", "checkpoint-15", "checkpoint-5", "checkpoint-7"]
    monkeypatch.undo()
    content["training"]["resume_from_checkpoint"] = state[1]
    content["optimizer"]["lr"] /= 2
    result = run(content, tmp_path / "out")
    assert result.report["length"]["steps"] == 30
    assert [row["step"] for row in log_of(result.folder) if "loss" in row] == list(range(1, 31))


def test_a_few_bad_steps_are_skipped_and_counted(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    original = step_module.summed_loss

    def loss(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(*arguments) * (float("nan") if calls in (2, 3) else 1.0)

    monkeypatch.setattr(step_module, "summed_loss", loss)
    result = run(recipe(llama, training={"max_steps": 6, "logging_steps": 1}), tmp_path / "out")
    assert result.report["length"]["skipped"] == 2
    assert result.report["notes"] == ["2 of 6 steps were skipped: their gradients were not finite."]
    assert [row.get("skipped") for row in log_of(result.folder)[:4]] == [None, 1, 1, None]


def test_a_loss_that_is_nan_from_the_start_leaves_nothing(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = step_module.summed_loss
    monkeypatch.setattr(step_module, "summed_loss", lambda *a: original(*a) * float("nan"))
    with pytest.raises(FinetuneError, match=r"steps 1 to 10 were not finite; .* nothing was learned yet"):
        run(recipe(llama, training={"max_steps": 20}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_at_a_checkpoint_keeps_the_one_before(
    llama: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content, out = recipe(llama, training=TRAINING), tmp_path / "out"
    reserve = os.posix_fallocate
    calls = 0

    def full(descriptor: int, offset: int, length: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 3:  # in the middle of the second checkpoint
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(descriptor, offset, length)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OutputError) as caught:
        run(content, out)
    message = str(caught.value)
    assert "No space left on device" in message
    assert "the run stopped after step 8, whose checkpoint could not be written" in message
    assert "checkpoint-4 is whole: the same command continues from it" in message
    monkeypatch.undo()
    assert kept(out) == ["checkpoint-4"]
    run(content, out)
    assert same_tensors(out, whole)


def test_a_disk_without_room_is_seen_before_a_byte_is_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mergekit_bayes.checkpoint import disk

    monkeypatch.setattr(disk, "free_bytes", lambda _: 1000)
    with pytest.raises(OutputError, match=r"1,000 bytes \(1\.0 kB\) free(.|\n)*there is none before it"):
        run(recipe(llama, training=TRAINING), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
