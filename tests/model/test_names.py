"""Parameters by the names they have on disk."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors import safe_open

from mergekit_bayes.checkpoint.index import open_checkpoint
from mergekit_bayes.model import saved_parameters
from mergekit_bayes.model.names import checkpoint_tensors, names_on_disk
from mergekit_bayes.recipe.adapter import AdapterSpec
from tests.conftest import TinyCheckpoints
from tests.model.builders import LABELS, load
from tests.model.conftest import Bases
from tests.tiny_models import tiny_model

AUTO = {"bert": "AutoModelForSequenceClassification", "vit": "AutoModelForImageClassification"}
AUTO |= {"vit_renamed": AUTO["vit"], "bert_masked_lm": "AutoModelForMaskedLM"}


def names_in(file: Path) -> set[str]:
    with safe_open(file, framework="pt") as opened:
        return set(opened.keys())


@pytest.mark.parametrize(
    "spec",
    [
        AdapterSpec(),
        AdapterSpec(modules_to_save=("lm_head", "input_layernorm")),
        AdapterSpec(target_modules=("q_proj", "embed_tokens", "lm_head")),
    ],
)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
def test_names_of_an_adapter_are_those_that_peft_writes(base: Bases, tmp_path: Path, spec: AdapterSpec) -> None:
    model = load(base("llama"), spec).model
    model.save_pretrained(tmp_path)
    written = {name for name in names_in(tmp_path / "adapter_model.safetensors") if ".base_layer." not in name}
    saved = saved_parameters(model)
    assert set(saved) == written
    assert {id(parameter) for parameter in saved.values()} == {id(p) for p in model.parameters() if p.requires_grad}


def test_names_of_a_classifier_s_adapter(base: Bases, tmp_path: Path) -> None:
    model = load(base("bert"), AdapterSpec(), labels=LABELS).model
    model.save_pretrained(tmp_path)
    assert set(saved_parameters(model)) == names_in(tmp_path / "adapter_model.safetensors")


def test_a_model_loaded_for_prediction_has_its_names_too(base: Bases, tiny_adapter: TinyCheckpoints) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(base("llama"))
    adapted = peft.PeftModel.from_pretrained(plain, tiny_adapter("llama", seed=1))
    assert saved_parameters(adapted) == {}
    assert set(saved_parameters(adapted, frozen=True)) == names_in(
        tiny_adapter("llama", seed=1) / "adapter_model.safetensors"
    )


@pytest.mark.parametrize(
    "name", ["llama", "llama_tied", "llama_bias", "gpt2", "bert", "bert_masked_lm", "vit", "mixtral_fused"]
)
def test_names_of_a_model_are_those_of_its_checkpoint(tiny_checkpoint: TinyCheckpoints, name: str) -> None:
    folder = tiny_checkpoint(name)
    model = getattr(transformers, AUTO.get(name, "AutoModelForCausalLM")).from_pretrained(folder)
    stored = open_checkpoint(folder).tensors
    saved = saved_parameters(model)
    assert {key: tuple(value.shape) for key, value in saved.items()} == {
        key: info.shape for key, info in stored.items()
    }
    assert {id(parameter) for parameter in saved.values()} == {id(parameter) for parameter in model.parameters()}
    on_disk = names_on_disk(model)
    assert all(saved[on_disk[key]] is parameter for key, parameter in model.named_parameters())


def test_experts_keep_the_layout_of_memory(tiny_checkpoint: TinyCheckpoints) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint("mixtral"))
    assert set(saved_parameters(model)) == set(open_checkpoint(tiny_checkpoint("mixtral_fused")).tensors)


def test_frozen_parameters_are_not_trained() -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.requires_grad_(False)
    assert "model.embed_tokens.weight" not in saved_parameters(model)
    assert "model.embed_tokens.weight" in saved_parameters(model, frozen=True)
    assert "model.embed_tokens.weight" in checkpoint_tensors(model)


def test_wrappers_are_looked_through(base: Bases, tmp_path: Path) -> None:
    model = load(base("llama"), AdapterSpec(target_modules=("q_proj",))).model
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = torch.compile(torch.nn.parallel.DistributedDataParallel(model), backend="eager")
        assert saved_parameters(wrapped) == saved_parameters(model)
    finally:
        torch.distributed.destroy_process_group()


def test_any_module_has_names() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    assert set(saved_parameters(module)) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert "1.running_mean" in checkpoint_tensors(module)
