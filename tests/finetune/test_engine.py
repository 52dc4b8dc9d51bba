"""Which launches a run accepts, and what Accelerate is told."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType

from mergekit_bayes.errors import FinetuneError
from mergekit_bayes.finetune import engine
from mergekit_bayes.finetune.engine import any_of, check_engine, loading_device, make_accelerator, shards
from mergekit_bayes.recipe import FinetuneRecipe, load_recipe
from mergekit_bayes.recipe.finetune import TrainingSpec
from tests.finetune.runs import recipe
from tests.tiny_models import tiny_model


def launched(kind: str, *, version: int = 2, activation_checkpointing: bool = False, **layout: bool) -> Any:
    """An accelerator as a launch of that kind makes it."""
    plugin = SimpleNamespace(activation_checkpointing=activation_checkpointing)
    return SimpleNamespace(
        distributed_type=DistributedType(kind),
        is_fsdp2=kind == "FSDP" and version == 2,
        state=SimpleNamespace(fsdp_plugin=plugin),
        parallelism_config=SimpleNamespace(**layout) if layout else None,
        device=torch.device("meta"),
        num_processes=2,
    )


def asked(**sections: Any) -> FinetuneRecipe:
    return load_recipe(recipe(Path("base"), **sections), expect=FinetuneRecipe)


@pytest.mark.parametrize("kind", ["NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU"])
def test_processes_with_a_whole_model_each_are_fine(kind: str) -> None:
    accelerator = launched(kind, tp_enabled=False, cp_enabled=False)
    check_engine(accelerator, asked(model={"load_in_4bit": True}, optimizer={"noise": "per_process"}))
    assert not shards(accelerator)
    assert loading_device(accelerator) == torch.device("meta")


def test_a_model_in_shards_is_fine_and_is_loaded_where_there_is_room() -> None:
    accelerator = launched("FSDP", dp_replicate_enabled=True)
    check_engine(accelerator, asked(training={"bf16": True, "gradient_checkpointing": True}))
    assert shards(accelerator)
    assert loading_device(accelerator) == torch.device("cpu")


@pytest.mark.parametrize(
    ("kind", "version", "words"),
    [
        ("DEEPSPEED", 0, "launch: DEEPSPEED: ZeRO trains copies of the weights"),
        ("FSDP", 1, "launch: FSDP 1 trains flattened copies of the weights"),
        ("MEGATRON_LM", 0, "launch: MEGATRON_LM: is not supported"),
        ("XLA", 0, "launch: XLA: is not supported"),
    ],
)
def test_other_engines_are_refused_with_those_that_work(kind: str, version: int, words: str) -> None:
    with pytest.raises(FinetuneError, match=words) as refused:
        check_engine(launched(kind, version=version), asked())
    assert "use DDP" in str(refused.value)
    assert "FSDP 2 (`accelerate launch --use_fsdp --fsdp_version 2 ...`)" in str(refused.value)


@pytest.mark.parametrize("kind", ["MULTI_GPU", "FSDP"])
def test_split_layers_or_rows_are_refused(kind: str) -> None:
    with pytest.raises(FinetuneError, match="launch: tp, sp_size > 1 splits layers or rows"):
        check_engine(launched(kind, tp_enabled=True, cp_enabled=False, sp_enabled=True), asked())


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"load_in_4bit": True}}, "model.load_in_4bit, load_in_8bit: quantised weights stay whole"),
        ({"training": {"fp16": True}}, "training.fp16: .*; set `training.bf16: true` instead"),
        ({"optimizer": {"noise": "per_process"}}, "optimizer.noise: per_process needs the whole gradient"),
    ],
)
def test_options_that_shards_do_not_allow(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(FinetuneError, match=f"launch: FSDP: {words}"):
        check_engine(launched("FSDP"), asked(**sections))


def test_activation_checkpointing_is_an_option_of_the_recipe() -> None:
    with pytest.raises(FinetuneError, match=r"set `training\.gradient_checkpointing: true`"):
        check_engine(launched("FSDP", activation_checkpointing=True), asked())


@pytest.mark.parametrize(("name", "layers"), [("llama", ["LlamaDecoderLayer"]), ("bert", ["BertLayer"])])
def test_layers_are_gathered_one_at_a_time(name: str, layers: list[str]) -> None:
    """An encoder calls the module of its embedding a layer, in which Accelerate would shard a second time."""
    assert engine._layers(tiny_model(name)) == layers


def test_a_flag_of_one_process_needs_no_other() -> None:
    one: Any = SimpleNamespace(num_processes=1)
    assert any_of(one, True) is True
    assert any_of(one, False) is False


def test_a_precision_that_the_device_has_not_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import accelerate

    def refuse(**_: Any) -> None:
        raise ValueError("bf16 mixed precision requires a newer device")

    monkeypatch.setattr(accelerate, "Accelerator", refuse)
    with pytest.raises(FinetuneError, match=r"training\.bf16: this device does not compute in it: bf16 mixed"):
        make_accelerator(TrainingSpec(bf16=True), tmp_path)


def test_runs_of_one_process_may_have_different_precisions(tmp_path: Path) -> None:
    for options, expected in (({"bf16": True}, "bf16"), ({}, "no"), ({"fp16": True}, "fp16")):
        accelerator = make_accelerator(TrainingSpec(**options), tmp_path)  # type: ignore[arg-type]
        assert accelerator.mixed_precision == expected
