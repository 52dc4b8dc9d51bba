"""Trained models and adapters in memory as they lie on disk: names, types, labels, and nothing that starts anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.index import open_checkpoint
from mergekit_bayes.errors import CheckpointError, MissingTensorError, ModelError
from mergekit_bayes.model.save import save_trained
from mergekit_bayes.model.trained import load_trained, open_trained, parameter_names
from mergekit_bayes.recipe.adapter import AdapterSpec
from mergekit_bayes.recipe.model import ModelSpec
from tests.conftest import TinyCheckpoints
from tests.model.builders import LABELS, TOKENS, load, minilm, perturb, with_tokenizer
from tests.tiny_models import save_tiny_adapter


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: TinyCheckpoints) -> Path:
    return with_tokenizer(tiny_checkpoint("llama"), tmp_path_factory.mktemp("trained") / "llama", pad=True)


def test_a_model_is_what_from_pretrained_makes_of_it(llama: Path) -> None:
    import transformers

    trained = open_trained(str(llama), None)
    loaded = load_trained(trained, ModelSpec(path=str(llama)), labels=None, device="cpu")
    assert (trained.folder, trained.local, trained.labels, trained.adapter) == (llama, True, None, None)
    assert trained.fingerprint == fingerprint(open_checkpoint(llama).tensors)
    assert trained.base == (None, None)
    assert not loaded.model.training
    assert loaded.model.config.use_cache is False
    other = transformers.AutoModelForCausalLM.from_pretrained(llama)
    with torch.no_grad():
        assert torch.equal(loaded.model(TOKENS).logits, other(TOKENS).logits)
    names = parameter_names(loaded.model, trained)
    assert set(names.values()) == set(trained.tensors)
    assert names.keys() == {name for name, _ in other.named_parameters()}


@pytest.mark.parametrize(("stored", "read"), [("bfloat16", torch.bfloat16), ("float16", torch.float32)])
def test_weights_are_read_as_they_are_stored_unless_gradients_would_overflow(
    tiny_checkpoint: TinyCheckpoints, tmp_path: Path, stored: str, read: torch.dtype
) -> None:
    model = with_tokenizer(tiny_checkpoint("llama", dtype=stored), tmp_path / "model", pad=True)
    adapter = save_tiny_adapter(model, tmp_path / "adapter", seed=1)
    trained = open_trained(str(model), str(adapter))
    loaded = load_trained(trained, ModelSpec(path=str(model)), labels=None, device="cpu")
    dtypes = {p.requires_grad: p.dtype for p in loaded.model.parameters()}
    assert dtypes == {True: torch.float32, False: read}
    asked = load_trained(trained, ModelSpec(path=str(model), dtype="float32"), labels=None, device="cpu")
    assert {p.dtype for p in asked.model.parameters()} == {torch.float32}


def test_an_adapter_is_what_peft_makes_of_it(llama: Path, tmp_path: Path) -> None:
    import peft
    import transformers

    adapter = save_tiny_adapter(llama, tmp_path / "adapter", seed=1)
    trained = open_trained(str(llama), str(adapter))
    loaded = load_trained(trained, ModelSpec(path=str(llama)), labels=None, device="cpu")
    other = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(llama), adapter)
    with torch.no_grad():
        assert torch.equal(loaded.model(TOKENS).logits, other(TOKENS).logits)
    assert trained.base == (str(llama), fingerprint(open_checkpoint(llama).tensors))
    names = parameter_names(loaded.model, trained)
    assert set(names.values()) == set(trained.tensors) == set(load_file(adapter / "adapter_model.safetensors"))
    assert all(p.requires_grad == (name in names) for name, p in loaded.model.named_parameters())


def test_a_trained_classifier_brings_its_head_and_its_labels(tmp_path: Path) -> None:
    base = minilm()
    spec = ModelSpec(path=str(base), task="sequence_classification")
    made = load(base, AdapterSpec(r=2), labels=LABELS)
    perturb(made.model, seed=3)
    save_trained(made.model, made.tokenizer, tmp_path / "adapter", base=made.base)
    trained = open_trained(str(base), str(tmp_path / "adapter"))
    assert trained.labels == LABELS
    loaded = load_trained(trained, spec, labels=trained.labels, device="cpu")
    batch = made.tokenizer(["a board game", "a mail server"], return_tensors="pt", padding=True)
    with torch.no_grad():
        assert torch.equal(loaded.model(**batch).logits, made.model(**batch).logits)
    full = load(base, labels=LABELS)
    save_trained(full.model, full.tokenizer, tmp_path / "full", base=full.base)
    opened = open_trained(str(tmp_path / "full"), None)
    assert (opened.labels, opened.base) == (LABELS, (str(base), full.base.fingerprint))


def test_a_head_that_would_start_at_random_is_refused(tmp_path: Path) -> None:
    base = minilm()
    spec = ModelSpec(path=str(base), task="sequence_classification")
    with pytest.raises(MissingTensorError, match="holds no classifier, which the task needs and which would start at"):
        load_trained(open_trained(str(base), None), spec, labels=LABELS, device="cpu")


def test_names_that_memory_does_not_have_are_refused(tiny_checkpoint: TinyCheckpoints, tmp_path: Path) -> None:
    """Experts lie one by one in the file and fused in memory."""
    model = with_tokenizer(tiny_checkpoint("mixtral"), tmp_path / "model", pad=True)
    trained = open_trained(str(model), None)
    loaded = load_trained(trained, ModelSpec(path=str(model)), labels=None, device="cpu")
    with pytest.raises(MissingTensorError, match="are stored as other tensors than they are in memory"):
        parameter_names(loaded.model, trained)


def test_a_published_checkpoint_may_lack_the_prefix(tiny_checkpoint: TinyCheckpoints, tmp_path: Path) -> None:
    model = with_tokenizer(tiny_checkpoint("gpt2"), tmp_path / "model", pad=True)
    tensors = load_file(model / "model.safetensors")
    short = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(short, model / "model.safetensors", {"format": "pt"})
    trained = open_trained(str(model), None)
    loaded = load_trained(trained, ModelSpec(path=str(model)), labels=None, device="cpu")
    assert set(parameter_names(loaded.model, trained).values()) == set(short)


def test_adapters_in_the_wrong_place(llama: Path, tmp_path: Path) -> None:
    adapter = save_tiny_adapter(llama, tmp_path / "adapter", seed=1)
    with pytest.raises(ModelError, match="expected the base as `model` and the adapter as `adapter`"):
        open_trained(str(adapter), None)
    with pytest.raises(ModelError, match="expected the base as `model` and the adapter as `adapter`"):
        open_trained(f"{llama}+{adapter}", None)
    with pytest.raises(ModelError, match="is no PEFT adapter"):
        open_trained(str(llama), str(llama))


def test_an_adapter_of_another_base(llama: Path, tmp_path: Path) -> None:
    adapter = save_tiny_adapter(llama, tmp_path / "adapter", seed=1)
    path = adapter / "adapter_model.safetensors"
    save_file(load_file(path), path, {"mergekit_bayes": json.dumps({"base_fingerprint": "another"})})
    with pytest.raises(CheckpointError, match="belongs to a base with fingerprint another; expected blake2b"):
        open_trained(str(llama), str(adapter))


def test_an_adapter_that_lacks_a_factor_in_memory(llama: Path, tmp_path: Path) -> None:
    adapter = save_tiny_adapter(llama, tmp_path / "adapter", seed=1)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = ["q_proj"]
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    (copy / "adapter_config.json").write_text(json.dumps(config))
    trained = open_trained(str(llama), str(copy))
    with pytest.raises(MissingTensorError, match="are in the file or in memory but not in both"):
        load_trained(trained, ModelSpec(path=str(llama)), labels=None, device="cpu")
