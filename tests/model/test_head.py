"""A classification head that the base has not, or has for other labels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from mergekit_bayes.errors import MergekitBayesError, MissingTensorError, ModelError, ShapeMismatchError
from mergekit_bayes.model import saved_parameters
from mergekit_bayes.model.head import starting_values
from mergekit_bayes.recipe.adapter import AdapterSpec
from tests.model.builders import LABELS, TOKENS, equal, load, logits, minilm, with_tokenizer
from tests.model.conftest import Bases
from tests.tiny_models import VOCABULARY, save_tiny_model

QUERIES = AdapterSpec(target_modules=("query",))
SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 24, "max_position_embeddings": 32}


def other_architecture(config: str, model: str, folder: Path, **sizes: object) -> Path:
    """A model without a classification head, of an architecture that `tiny_models` has not."""
    built = getattr(transformers, model)(getattr(transformers, config)(**{**SIZES, **sizes}))
    plain = folder.with_name(f"{folder.name}-plain")
    built.save_pretrained(plain)
    return with_tokenizer(plain, folder)


def test_a_real_encoder_gets_a_head() -> None:
    loaded = load(minilm(), QUERIES, labels=LABELS)
    assert loaded.model.config.id2label == dict(enumerate(LABELS))
    assert loaded.model.config.label2id == {label: index for index, label in enumerate(LABELS)}
    names = {name.removeprefix("base_model.model.") for name in saved_parameters(loaded.model) if "lora" not in name}
    assert names == set(loaded.base.fresh) == {"classifier.weight", "classifier.bias"}
    batch = loaded.tokenizer(["a small stone", "an oak"], return_tensors="pt", padding=True)
    found = loaded.model(**batch, labels=torch.tensor([2, 1]))
    found.loss.backward()
    assert found.logits.shape == (2, 3)
    assert all(parameter.grad is not None for parameter in saved_parameters(loaded.model).values())


def test_the_head_starts_from_the_seed_alone(base: Bases) -> None:
    folder = base("llama")
    fresh = load(folder, AdapterSpec(), labels=LABELS, seed=3).base.fresh
    torch.manual_seed(1)
    half = load(folder, None, labels=LABELS, seed=3, dtype="bfloat16")
    coded = load(folder, AdapterSpec(), labels=LABELS, seed=3, load_in_4bit=True)
    assert fresh.keys() == {"score.weight"}
    assert 0.01 < float(fresh["score.weight"].std()) < 0.04  # the architecture's own rule, std 0.02
    assert equal(fresh, half.base.fresh)
    assert equal(fresh, coded.base.fresh)
    assert not equal(fresh, load(folder, AdapterSpec(), labels=LABELS, seed=4).base.fresh)
    trained = saved_parameters(coded.model)["base_model.model.score.weight"]
    assert trained.dtype == torch.float32
    assert torch.equal(trained, fresh["score.weight"])


def test_the_head_is_trained_in_float32_on_a_bfloat16_model(base: Bases) -> None:
    loaded = load(base("llama"), AdapterSpec(), labels=LABELS, dtype="bfloat16")
    found = loaded.model(input_ids=TOKENS, labels=torch.tensor([0, 2]))
    found.loss.backward()
    assert found.logits.dtype == torch.float32
    head = saved_parameters(loaded.model)["base_model.model.score.weight"]
    assert head.dtype == torch.float32
    assert head.grad is not None


def test_a_decoder_knows_its_padding(base: Bases) -> None:
    """The label is read off the last token that is no padding."""
    loaded = load(base("llama", pad=True), AdapterSpec(), labels=LABELS)
    pad = loaded.tokenizer.pad_token_id
    assert loaded.model.config.pad_token_id == pad == VOCABULARY - 1
    padded = torch.cat([TOKENS, torch.full((2, 3), pad)], dim=1)
    mask = (padded != pad).long()
    with torch.no_grad():
        found = loaded.model(input_ids=padded, attention_mask=mask).logits
    assert torch.allclose(found, logits(loaded.model), atol=1e-6)


def test_a_head_of_several_layers_is_trained_whole_and_has_no_factors(tmp_path: Path) -> None:
    folder = other_architecture("RobertaConfig", "RobertaForMaskedLM", tmp_path / "m", pad_token_id=0)
    loaded = load(folder, AdapterSpec(), labels=LABELS)
    assert loaded.longest_row == 31  # positions count from after the padding token
    head = {f"classifier.{layer}.{part}" for layer in ("dense", "out_proj") for part in ("weight", "bias")}
    assert set(loaded.base.fresh) == head
    names = {name.removeprefix("base_model.model.") for name in saved_parameters(loaded.model)}
    assert {name for name in names if "classifier" in name} == head
    assert {name for name in names if "lora" not in name} == head


def test_a_pooler_that_the_base_lacks_is_part_of_the_head(base: Bases) -> None:
    loaded = load(base("bert_masked_lm"), QUERIES, labels=LABELS)
    expected = {f"bert.pooler.dense.{part}" for part in ("weight", "bias")} | {"classifier.weight", "classifier.bias"}
    assert set(loaded.base.fresh) == expected
    names = {name.removeprefix("base_model.model.") for name in saved_parameters(loaded.model) if "lora" not in name}
    assert names == expected


@pytest.mark.parametrize(
    ("config", "model", "head"),
    [
        ("DistilBertConfig", "DistilBertForMaskedLM", {"pre_classifier", "classifier"}),
        ("ElectraConfig", "ElectraForPreTraining", {"classifier"}),
        ("DebertaV2Config", "DebertaV2ForMaskedLM", {"pooler", "classifier"}),
        ("ModernBertConfig", "ModernBertForMaskedLM", {"classifier"}),
        ("GPT2Config", "GPT2LMHeadModel", {"score"}),
    ],
)
def test_heads_of_other_architectures(tmp_path: Path, config: str, model: str, head: set[str]) -> None:
    sizes = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2} if "Modern" in config or "GPT" in config else {}
    sizes |= {"cls_token_id": 1, "sep_token_id": 2} if "Modern" in config else {}
    loaded = load(other_architecture(config, model, tmp_path / "m", **sizes), AdapterSpec(), labels=LABELS)
    assert {name.split(".")[0] for name in loaded.base.fresh} == head
    loaded.model(input_ids=TOKENS, labels=torch.tensor([0, 1])).loss.backward()
    without = [name for name, parameter in saved_parameters(loaded.model).items() if parameter.grad is None]
    assert without == []


def test_all_weights_of_a_classifier_can_be_trained(base: Bases) -> None:
    loaded = load(minilm(), None, labels=LABELS)
    saved = saved_parameters(loaded.model)
    assert len(saved) == 105
    assert {name for name in saved if name in loaded.base.fresh} == {"classifier.weight", "classifier.bias"}
    assert torch.equal(saved["classifier.weight"], loaded.base.fresh["classifier.weight"])


def test_a_head_of_the_base_is_kept(base: Bases) -> None:
    folder = base("bert")
    loaded = load(folder, QUERIES, labels=LABELS)
    stored = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert loaded.base.fresh == {}
    assert torch.equal(logits(loaded.model), logits(stored.eval()))
    assert "base_model.model.classifier.weight" in saved_parameters(loaded.model)  # and trained further
    assert loaded.model.config.id2label == dict(enumerate(LABELS))


def test_starting_values_leave_the_model_and_the_random_numbers_alone(base: Bases) -> None:
    model = load(base("bert"), labels=LABELS).model
    before, state = model.classifier.weight.clone(), torch.random.get_rng_state()
    starting_values(model, ("classifier",), seed=1)
    assert torch.equal(model.classifier.weight, before)
    assert torch.equal(torch.random.get_rng_state(), state)


# --- refusals


def named(folder: Path, to: Path, labels: list[str]) -> Path:
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    config.update(id2label=dict(enumerate(labels)), label2id={label: index for index, label in enumerate(labels)})
    (to / "config.json").write_text(json.dumps(config))
    return to


def test_labels_of_the_base_in_another_order(base: Bases, tmp_path: Path) -> None:
    folder = named(base("bert"), tmp_path / "m", ["stone", "plant", "animal"])
    with pytest.raises(ModelError, match=r"knows the labels \['stone', 'plant', 'animal'\]; the data has"):
        load(folder, QUERIES, labels=LABELS)
    assert load(folder, QUERIES, labels=("stone", "plant", "animal")).base.fresh == {}


def test_more_labels_than_the_head_has(base: Bases) -> None:
    with pytest.raises(ShapeMismatchError, match=r"head has classifier\.\w+ of shape \(3,.*labels need \(4,"):
        load(base("bert"), QUERIES, labels=(*LABELS, "cloud"))


def test_a_classification_without_labels(base: Bases) -> None:
    with pytest.raises(ModelError, match="sequence_classification needs the labels of the data, found none"):
        load(base("bert"), QUERIES, task="sequence_classification")


def test_half_a_head(base: Bases, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(base("bert"), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    del tensors["classifier.bias"]
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingTensorError, match=r"lacks classifier\.bias"):
        load(tmp_path / "m", QUERIES, labels=LABELS)


def test_a_layer_that_is_missing_is_no_head(base: Bases, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(base("bert_masked_lm"), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    lost = "bert.encoder.layer.1.output.dense.weight"
    del tensors[lost]
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MissingTensorError, match=rf"lacks {lost}"):
        load(tmp_path / "m", QUERIES, labels=LABELS)


def test_an_encoder_with_something_that_fits_nowhere(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = other_architecture("BertConfig", "BertModel", tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {**tensors, "encoder.extra.weight": torch.ones(2)}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(
        MissingTensorError, match=r"holds .*encoder\.extra\.weight, which BertForSequenceClassification"
    ):
        load(folder, QUERIES, labels=LABELS)


def test_an_architecture_without_classification(tmp_path: Path) -> None:
    save_tiny_model("vit", tmp_path / "plain")
    with pytest.raises(MergekitBayesError, match="Unrecognized configuration class"):
        load(with_tokenizer(tmp_path / "plain", tmp_path / "m"), AdapterSpec(), labels=LABELS)
