"""4-bit and 8-bit weights on a CPU: what is coded, what is trained, and that evaluation changes nothing."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_bayes.errors import ModelError, NonFiniteError
from mergekit_bayes.model import saved_parameters
from mergekit_bayes.recipe.adapter import AdapterSpec
from tests.model.builders import LABELS, TOKENS, equal, load, logits, minilm
from tests.model.conftest import Bases

NF4 = {"load_in_4bit": True}
INT8 = {"load_in_8bit": True}


def kinds(model: torch.nn.Module) -> dict[str, str]:
    """The class of every linear layer, factors left out."""
    return {
        name.removesuffix(".base_layer"): type(module).__name__
        for name, module in model.named_modules()
        if "Linear" in type(module).__name__ and "lora" not in f"{name}{type(module).__module__}"
    }


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        (NF4, "Linear4bit"),
        ({**NF4, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True}, "Linear4bit"),
        ({**NF4, "dtype": "bfloat16"}, "Linear4bit"),
        (INT8, "Linear8bitLt"),
    ],
    ids=["nf4", "fp4 twice", "nf4 in bfloat16", "int8"],
)
@pytest.mark.filterwarnings("error")
def test_factors_learn_beside_codes(
    base: Bases,
    options: dict[str, object],
    kind: str,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = base("llama")
    loaded = load(folder, AdapterSpec(), **options)
    found = kinds(loaded.model)
    assert {name for name, each in found.items() if each != kind} == {"base_model.model.lm_head"}
    assert {parameter.dtype for parameter in saved_parameters(loaded.model).values()} == {torch.float32}
    assert torch.allclose(logits(loaded.model).float(), logits(load(folder).model), atol=0.2)
    optimizer = torch.optim.AdamW(saved_parameters(loaded.model).values(), lr=0.02)
    losses = []
    for _ in range(8):
        loss = loaded.model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    captured = capfd.readouterr()
    assert "will be cast" not in captured.out + captured.err + caplog.text


def test_the_factors_start_as_they_do_beside_plain_weights(base: Bases) -> None:
    folder = base("llama")
    plain = saved_parameters(load(folder, AdapterSpec()).model)
    assert equal(plain, saved_parameters(load(folder, AdapterSpec(), **NF4).model))
    assert equal(plain, saved_parameters(load(folder, AdapterSpec(), **INT8).model))


@pytest.mark.parametrize("options", [NF4, INT8], ids=["nf4", "int8"])
def test_evaluation_leaves_the_codes_as_they_are(base: Bases, options: dict[str, object]) -> None:
    model = load(base("llama"), AdapterSpec(), **options).model
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    first = model.train()(input_ids=TOKENS).logits
    with torch.no_grad():
        model.eval()(input_ids=TOKENS)
    assert equal(before, dict(model.named_parameters()))
    assert torch.equal(model.train()(input_ids=TOKENS).logits, first)


def test_what_4_bit_weights_are_multiplied_as(base: Bases) -> None:
    def compute(**options: object) -> torch.dtype:
        model = load(base("llama", dtype="bfloat16"), AdapterSpec(), **NF4, **options).model
        layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj.base_layer")
        assert isinstance(layer.compute_dtype, torch.dtype)
        return layer.compute_dtype

    assert compute() == torch.bfloat16  # as stored
    assert compute(training_dtype=torch.float32) == torch.float32
    assert compute(training_dtype=torch.float32, bnb_4bit_compute_dtype="bfloat16") == torch.bfloat16


def test_float16_beside_codes_becomes_float32(base: Bases) -> None:
    model = load(base("llama", dtype="float16"), AdapterSpec(), **NF4).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.uint8, torch.float32}


@pytest.mark.parametrize("options", [NF4, INT8], ids=["nf4", "int8"])
def test_a_new_head_and_modules_trained_whole_are_not_coded(options: dict[str, object]) -> None:
    spec = AdapterSpec(modules_to_save=("layer.5.output.dense",))
    loaded = load(minilm(), spec, labels=LABELS, **options)
    plain = {name.removeprefix("base_model.model.") for name, kind in kinds(loaded.model).items() if kind == "Linear"}
    whole = {"classifier", "bert.pooler.dense", "bert.encoder.layer.5.output.dense"}
    assert {name.partition(".modules_to_save")[0].partition(".original_module")[0] for name in plain} == whole
    loaded.model(input_ids=TOKENS, labels=torch.tensor([0, 1])).loss.backward()
    assert all(parameter.grad is not None for parameter in saved_parameters(loaded.model).values())


@pytest.mark.parametrize("options", [NF4, INT8], ids=["nf4", "int8"])
def test_weights_that_are_not_finite_do_not_become_codes(
    base: Bases, tmp_path: Path, options: dict[str, object]
) -> None:
    shutil.copytree(base("llama"), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 3] = float("nan")
    save_file(tensors, tmp_path / "m" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.down_proj\.weight: 1 of 384 values"):
        load(tmp_path / "m", AdapterSpec(), **options)


def test_bitsandbytes_that_is_not_installed(base: Bases, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "bitsandbytes" else find_spec(name, *rest)
    )
    with pytest.raises(
        ModelError, match=r"need bitsandbytes, which is not installed; pip install 'mergekit-bayes\[quantize\]'"
    ):
        load(base("llama"), AdapterSpec(), **NF4)
