"""Posteriors of real architectures: names in files find parameters in memory, whatever library loaded them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergekit_bayes.errors import (
    EvaluateError,
    MissingTensorError,
    PlanError,
    ShapeMismatchError,
    SidecarMismatchError,
)
from mergekit_bayes.model import saved_parameters
from mergekit_bayes.predict import (
    attach_posterior,
    predict_next_tokens,
    predict_probabilities,
    read_precisions,
    sample_posterior,
)
from mergekit_bayes.predict.names import weights_of
from tests.conftest import TinyCheckpoints
from tests.merge.builders import random_precisions, tensor_infos, write_precisions
from tests.predict.small_models import same, weights_in
from tests.tiny_models import VOCABULARY, tiny_model

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # PEFT, where it saves a copy

IDS = torch.arange(1, 11).view(2, 5)


def with_sidecar(folder: Path, copy: Path, **metadata: Any) -> Path:
    """A copy of a model folder with precisions beside its weights."""
    shutil.copytree(folder, copy)
    shapes = {name: info.shape for name, info in tensor_infos(copy).items()}
    write_precisions(copy, random_precisions(5, shapes, above=10.0), **metadata)
    return copy


@pytest.fixture(scope="module")
def adapter(tiny_adapter: TinyCheckpoints, tiny_checkpoint: TinyCheckpoints, tmp_path_factory: Any) -> Path:
    """An adapter of all linear layers and the embedding, with a sidecar that knows its base."""
    folder = tiny_adapter("llama", seed=1, target_modules=["q_proj", "down_proj", "embed_tokens"])
    return with_sidecar(folder, tmp_path_factory.mktemp("adapter") / "copy", base=tiny_checkpoint("llama"))


@pytest.fixture
def base(tiny_checkpoint: TinyCheckpoints) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama"))


def changed(model: Any, precision: Any, **options: Any) -> set[str]:
    """Names in memory of what a sample changes; the mean must return."""
    before = weights_in(model)
    posterior = attach_posterior(model, precision, **options)
    with sample_posterior(model, posterior, sample=0):
        inside = weights_in(model)
    assert same(weights_in(model), before)
    return {name for name, tensor in inside.items() if not torch.equal(tensor, before[name])}


def test_the_factors_of_an_adapter_are_sampled_and_nothing_else(adapter: Path, base: Any) -> None:
    model = peft.PeftModel.from_pretrained(base, adapter)
    names = changed(model, adapter)
    assert names == {name for name in weights_in(model) if ".lora_" in name}
    assert len(names) == len(load_file(adapter / "precision.safetensors")) == 10
    posterior = attach_posterior(model, adapter)
    assert posterior.adapter == "default"
    assert [weight.name for weight in posterior.weights] == sorted(load_file(adapter / "precision.safetensors"))
    assert posterior.certain == ()


def test_names_are_those_under_which_trained_models_are_saved(adapter: Path, base: Any) -> None:
    adapted = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True)
    for model in (adapted, tiny_model("vit"), tiny_model("qwen2_tied"), tiny_model("mixtral")):
        known = weights_of(model).parameters
        saved = saved_parameters(model, frozen=True)
        assert saved
        assert all(known[name] is parameter for name, parameter in saved.items())


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def sampled(model: Any, precision: Any, **options: Any) -> Tensor:
    posterior = attach_posterior(model, precision, **options)
    with sample_posterior(model, posterior, sample=1):
        return logits(model)


def test_however_an_adapter_is_loaded_its_samples_are_the_same(adapter: Path, base: Any) -> None:
    model = peft.PeftModel.from_pretrained(base, adapter, adapter_name="mine")
    expected = sampled(model, adapter)
    assert not torch.equal(expected, logits(model))
    in_memory = {
        name.replace(".weight", ".mine.weight") if name.endswith(".weight") else f"{name}.mine": precision
        for name, precision in read_precisions(adapter).items()
    }
    assert in_memory.keys() <= dict(model.named_parameters()).keys()
    assert torch.equal(sampled(model, in_memory), expected)
    assert torch.equal(sampled(torch.compile(model, backend="eager"), adapter), expected)
    assert torch.equal(sampled(torch.nn.DataParallel(model), adapter), expected)
    model.unload()
    without_peft = transformers.AutoModelForCausalLM.from_pretrained(base.name_or_path)
    without_peft.load_adapter(str(adapter))
    assert torch.equal(sampled(without_peft, adapter), expected)


def test_of_several_adapters_the_active_one_is_sampled(adapter: Path, base: Any) -> None:
    model = peft.PeftModel.from_pretrained(base, adapter, adapter_name="one")
    model.load_adapter(adapter, adapter_name="two")
    assert all(".one" in name for name in changed(model, adapter))
    model.set_adapter("two")
    assert all(".two" in name for name in changed(model, adapter))
    with pytest.raises(EvaluateError, match=r"uses two; call set_adapter\('one'\) first"):
        attach_posterior(model, adapter, adapter="one")
    with pytest.raises(EvaluateError, match="has the adapters one, two; expected three among them"):
        attach_posterior(model, adapter, adapter="three")
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(EvaluateError, match="has the adapters one, two; expected one of them as `adapter`"):
        attach_posterior(model, adapter)
    assert all(".one" in name for name in changed(model, adapter, adapter="one"))


def test_an_adapter_without_effect_is_refused(adapter: Path, base: Any) -> None:
    model = peft.PeftModel.from_pretrained(base, adapter)
    posterior = attach_posterior(model, adapter)
    model.merge_adapter()
    for use in (
        lambda: attach_posterior(model, adapter),
        lambda: sample_posterior(model, posterior, sample=0).__enter__(),
    ):
        with pytest.raises(
            EvaluateError, match="merged into its weight; expected factors in use; call unmerge_adapter"
        ):
            use()
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(EvaluateError, match="has its adapters disabled"):
        attach_posterior(model, adapter)
    with pytest.raises((SidecarMismatchError, PlanError), match="a full model, and this one has an adapter"):
        attach_posterior(model, {"model.norm.weight": 1.0})
    with pytest.raises(SidecarMismatchError, match="load it with peft and do not merge it into its base"):
        attach_posterior(model.merge_and_unload(), adapter)


def test_an_adapter_of_other_values_is_refused(adapter: Path, base: Any, tmp_path: Path) -> None:
    model = peft.PeftModel.from_pretrained(base, adapter)
    name, factor = next((n, p) for n, p in model.named_parameters() if "lora_A" in n)
    with torch.no_grad():
        factor[-1, -1] += 1e-3
    with pytest.raises(
        SidecarMismatchError, match=r"describes other values of base_model\S+lora_A.weight than the model"
    ):
        attach_posterior(model, adapter)
    assert name in changed(model, read_precisions(adapter))


def test_an_adapter_may_be_held_in_another_type(adapter: Path, base: Any) -> None:
    model = peft.PeftModel.from_pretrained(base, adapter)
    assert len(changed(model.bfloat16(), adapter)) == 10
    assert len(changed(model.float(), adapter)) == 10


def test_an_adapter_on_another_base_is_refused(adapter: Path, tiny_checkpoint: TinyCheckpoints) -> None:
    other = transformers.AutoModelForCausalLM.from_pretrained(tiny_checkpoint("llama", seed=3))
    model = peft.PeftModel.from_pretrained(other, adapter)
    with pytest.raises(SidecarMismatchError, match="belongs to a base with fingerprint"):
        attach_posterior(model, adapter)
    assert changed(model, read_precisions(adapter))


def test_a_sidecar_of_other_weights_is_refused(adapter: Path, base: Any, tmp_path: Path) -> None:
    model = peft.PeftModel.from_pretrained(base, adapter)
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    write_precisions(copy, read_precisions(adapter), mean_fingerprint="blake2b-16:" + 32 * "0")
    with pytest.raises(SidecarMismatchError, match="describes weights with fingerprint"):
        attach_posterior(model, copy)
    alone = Path(shutil.copy(copy / "precision.safetensors", tmp_path / "alone.safetensors"))
    assert len(changed(model, alone)) == 10


def test_modules_stored_whole_are_part_of_an_adapter(tmp_path: Path, tiny_checkpoint: TinyCheckpoints) -> None:
    source = tiny_checkpoint("bert")
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"], init_lora_weights=False)
    peft.get_peft_model(load(source), config).save_pretrained(tmp_path / "adapter")
    folder = with_sidecar(tmp_path / "adapter", tmp_path / "copy", base=source)
    model = peft.PeftModel.from_pretrained(load(source), folder)
    names = changed(model, folder)
    assert "base_model.model.classifier.modules_to_save.default.weight" in names
    assert "base_model.model.classifier.original_module.weight" not in names
    assert len(names) == 6
    batches = [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": torch.tensor([0, 2])}]
    at_mean, averaged = (predict_probabilities(model, batches, folder, samples=samples) for samples in (0, 4))
    assert at_mean.probabilities.shape == averaged.probabilities.shape == (2, 3)
    assert not torch.equal(at_mean.probabilities, averaged.probabilities)


def test_a_language_model_predicts_with_its_own_shift(adapter: Path, base: Any) -> None:
    model = peft.PeftModel.from_pretrained(base, adapter)
    labels = IDS.clone()
    labels[0, :3] = -100
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "labels": labels}
    found = predict_next_tokens(model, [batch])
    assert float(found.nll.mean()) == pytest.approx(float(model.eval()(**batch).loss), rel=1e-5)
    averaged = predict_next_tokens(model, [batch], adapter, samples=3, vocabulary=True)
    assert averaged.nll.shape == (6,)
    assert averaged.vocabulary is not None
    assert float(averaged.vocabulary.entropy.max()) <= torch.tensor(VOCABULARY).log()


FULL = {
    "llama": "AutoModelForCausalLM",
    "llama_tied": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "bert": "AutoModelForSequenceClassification",
    "bert_masked_lm": "AutoModelForMaskedLM",
    "vit": "AutoModelForImageClassification",
    "vit_renamed": "AutoModelForImageClassification",
}


@pytest.mark.parametrize("name", FULL)
def test_all_weights_of_a_full_checkpoint_are_sampled(
    name: str, tiny_checkpoint: TinyCheckpoints, tmp_path: Path
) -> None:
    folder = with_sidecar(tiny_checkpoint(name), tmp_path / "model")
    model = getattr(transformers, FULL[name]).from_pretrained(folder)
    assert changed(model, folder) == {name for name, _ in model.named_parameters(remove_duplicate=False)}
    posterior = attach_posterior(model, folder)
    assert [weight.name for weight in posterior.weights] == sorted(read_precisions(folder))


def test_a_tied_weight_has_one_precision(tiny_checkpoint: TinyCheckpoints, tmp_path: Path) -> None:
    folder = with_sidecar(tiny_checkpoint("llama_tied"), tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    precisions = read_precisions(folder)
    both = {**precisions, "lm_head.weight": precisions["model.embed_tokens.weight"]}
    count = len(list(model.parameters()))
    assert len(attach_posterior(model, both).weights) == count
    both["lm_head.weight"] = 2 * both["lm_head.weight"]
    with pytest.raises(SidecarMismatchError, match=r"lm_head.weight and model.embed_tokens.weight are one parameter"):
        attach_posterior(model, both)
    del both["model.embed_tokens.weight"]
    assert len(attach_posterior(model, both).weights) == count


def test_a_model_without_its_head_knows_the_names_of_one_with_it(
    tiny_checkpoint: TinyCheckpoints, tmp_path: Path
) -> None:
    folder = with_sidecar(tiny_checkpoint("bert"), tmp_path / "model")
    bare = transformers.AutoModel.from_pretrained(folder)
    with pytest.raises(
        SidecarMismatchError, match=r"has precisions for classifier.bias, classifier.weight; .*left out"
    ):
        attach_posterior(bare, folder)
    body = {name: value for name, value in read_precisions(folder).items() if not name.startswith("classifier")}
    assert len(attach_posterior(bare, body).weights) == len(body) == len(list(bare.parameters()))
    headed = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    without_prefix = {name.removeprefix("bert."): value for name, value in body.items()}
    with pytest.raises(
        MissingTensorError, match=r"no precision for classifier.bias, classifier.weight; .*partial=True"
    ):
        attach_posterior(headed, without_prefix)
    posterior = attach_posterior(headed, without_prefix, partial=True)
    assert len(posterior.weights) == len(body)
    assert posterior.certain == ("classifier.bias", "classifier.weight")


def test_what_was_not_trained_stays_where_it_is(tiny_checkpoint: TinyCheckpoints, tmp_path: Path) -> None:
    """A sidecar with a scalar prior may leave out what training left alone: that is known, not as wide as its prior."""
    folder = Path(shutil.copytree(tiny_checkpoint("bert"), tmp_path / "model"))
    precisions = {"classifier.weight": torch.full((3, 16), 50.0), "classifier.bias": torch.full((3,), 50.0)}
    write_precisions(folder, precisions, prior_precision=0.001)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert changed(model, folder) == set(precisions)


def test_weights_that_are_parts_of_larger_ones_are_refused(tiny_checkpoint: TinyCheckpoints, tmp_path: Path) -> None:
    folder = with_sidecar(tiny_checkpoint("mixtral"), tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises((SidecarMismatchError, PlanError), match="parts of larger parameters in memory"):
        attach_posterior(model, folder)
    fused = with_sidecar(tiny_checkpoint("mixtral_fused"), tmp_path / "fused")
    model = transformers.AutoModelForCausalLM.from_pretrained(fused)
    assert len(attach_posterior(model, fused).weights) == len(list(model.parameters()))


def test_a_model_that_was_never_saved_needs_only_names() -> None:
    model = tiny_model("qwen2_tied")
    precisions = {name: 5.0 for name, _ in model.named_parameters()}
    assert changed(model, precisions) >= precisions.keys()


QUANTISED: dict[str, Callable[[], Any]] = {
    "nf4": lambda: transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "int8": lambda: transformers.BitsAndBytesConfig(load_in_8bit=True),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of bitsandbytes on CPU
@pytest.mark.parametrize("kind", QUANTISED)
def test_an_adapter_on_a_quantised_base_is_sampled(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    # widths are multiples of 64: bitsandbytes packs the weights of no others on a CPU
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=VOCABULARY, **sizes))
    base.save_pretrained(tmp_path / "base")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    peft.get_peft_model(base, lora).save_pretrained(tmp_path / "saved")
    folder = with_sidecar(tmp_path / "saved", tmp_path / "adapter", base=tmp_path / "base")
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=QUANTISED[kind](), dtype=torch.bfloat16
    )
    model = peft.PeftModel.from_pretrained(quantised, folder)
    names = changed(model, folder)
    assert len(names) == 8
    assert all(model.get_parameter(name).dtype == torch.float32 for name in names)
    batch = {"input_ids": IDS, "labels": IDS}
    before = predict_next_tokens(model, [batch])
    assert not torch.equal(predict_next_tokens(model, [batch], folder, samples=2).nll, before.nll)
    assert torch.equal(predict_next_tokens(model, [batch]).nll, before.nll)
    plain = model.unload()
    weight = next(name for name, parameter in plain.named_parameters() if not parameter.is_floating_point())
    with pytest.raises(ShapeMismatchError, match="quantised weights have no posterior to sample"):
        attach_posterior(plain, {weight: 1.0}, partial=True)
