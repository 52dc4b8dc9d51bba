from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mergekit_bayes.checkpoint.adapter import Adapter, LoraModule, open_adapter
from mergekit_bayes.checkpoint.header import TensorInfo
from mergekit_bayes.checkpoint.index import open_checkpoint
from mergekit_bayes.checkpoint.orientation import orient, transposed_weights


def info(name: str, *shape: int) -> TensorInfo:
    return TensorInfo(name, "F32", shape, Path("model.safetensors"), 0, 4 * torch.Size(shape).numel())


def adapter_of(*shapes: tuple[str, int, int], transposed: bool = False, kind: str = "linear") -> Adapter:
    """An adapter whose modules have (name, out_features, in_features)."""
    modules = {
        name: LoraModule(name, info("a", 2, columns), info("b", rows, 2), 2, 1.0, kind, transposed)
        for name, rows, columns in shapes
    }
    return Adapter("adapter", Path("adapter"), {}, modules, {}, {}, {}, None)


def base_of(*tensors: TensorInfo) -> dict[str, TensorInfo]:
    return {tensor.name: tensor for tensor in tensors}


def oriented(adapter: Adapter, *tensors: TensorInfo) -> dict[str, bool]:
    return {name: module.transposed for name, module in orient(adapter, base_of(*tensors)).modules.items()}


@pytest.mark.parametrize("flag", [False, True])
def test_the_shape_decides_whatever_the_flag_says(flag):
    adapter = adapter_of(("h.0.up", 6, 4), ("h.0.down", 4, 6), transposed=flag)
    assert oriented(adapter, info("h.0.up.weight", 6, 4), info("h.0.down.weight", 6, 4)) == {
        "h.0.up": False,
        "h.0.down": True,
    }


@pytest.mark.parametrize("flag", [False, True])
def test_a_square_weight_follows_the_biases_of_its_layer(flag):
    adapter = adapter_of(("h.0.out", 4, 4), ("h.1.out", 4, 4), transposed=flag)
    squares = [info("h.0.out.weight", 4, 4), info("h.0.out.bias", 4), info("h.1.out.weight", 4, 4)]
    conv = [info("h.0.in.weight", 4, 12), info("h.0.in.bias", 12)]
    linear = [info("h.1.in.weight", 12, 4), info("h.1.in.bias", 12)]
    assert oriented(adapter, *squares, *conv, *linear) == {"h.0.out": True, "h.1.out": False}


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize(
    "others",
    [
        [],
        [info("h.0.in.weight", 4, 12)],
        [info("h.0.in.bias", 12)],
        [info("h.0.in.weight", 4, 12), info("h.0.in.bias", 5)],
        [info("h.1.in.weight", 4, 12), info("h.1.in.bias", 12)],
        [info("h.0.a.weight", 4, 12), info("h.0.a.bias", 12), info("h.0.b.weight", 12, 4), info("h.0.b.bias", 12)],
        [info("h.0.norm.weight", 4), info("h.0.norm.bias", 4)],
        [info("h.0.conv.weight", 4, 3, 3), info("h.0.conv.bias", 4)],
    ],
)
def test_without_evidence_the_configuration_stands(flag, others):
    adapter = adapter_of(("h.0.out", 4, 4), transposed=flag)
    assert oriented(adapter, info("h.0.out.weight", 4, 4), *others) == {"h.0.out": flag}


@pytest.mark.parametrize("flag", [False, True])
def test_what_fits_nowhere_and_what_is_absent_is_left_to_the_plan(flag):
    adapter = adapter_of(("h.0.up", 6, 4), ("gone", 3, 5), transposed=flag)
    assert oriented(adapter, info("h.0.up.weight", 7, 4)) == {"h.0.up": flag, "gone": flag}


def test_embeddings_have_one_orientation():
    adapter = adapter_of(("wte", 4, 6), kind="embedding")
    assert oriented(adapter, info("wte.weight", 6, 4)) == {"wte": False}


def test_names_may_lack_the_outermost_prefix():
    adapter = adapter_of(("transformer.h.0.in", 12, 4), ("transformer.h.0.out", 4, 4))
    tensors = [info("h.0.in.weight", 4, 12), info("h.0.in.bias", 12), info("h.0.out.weight", 4, 4)]
    assert set(oriented(adapter, *tensors).values()) == {True}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "targets", [["c_attn", "c_proj", "lm_head"], r".*attn\.c_proj|lm_head", ["c_proj"], ["wte", "c_attn"]]
)
def test_as_peft_stores_it_even_where_the_saved_flag_is_wrong(tiny_checkpoint, tmp_path, targets):
    import peft
    import transformers

    base = tiny_checkpoint("gpt2")
    model = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(r=2, target_modules=targets)
    )
    model.save_pretrained(tmp_path)
    flag = json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"]
    assert flag == ("lm_head" not in targets)  # PEFT keeps what its last layer needed
    adapter = orient(open_adapter(tmp_path), open_checkpoint(base).tensors)
    assert adapter.modules
    for name, module in adapter.modules.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        if module.kind == "linear":
            assert module.transposed == layer.fan_in_fan_out, name
        assert module.weight_shape == tuple(layer.get_base_layer().weight.shape)


def test_weights_that_a_checkpoint_stores_transposed() -> None:
    tensors = {
        "wte.weight": (9, 4),
        "h.0.attn.weight": (4, 12),
        "h.0.attn.bias": (12,),
        "h.0.proj.weight": (4, 4),
        "h.0.proj.bias": (4,),
        "h.0.gate.weight": (4, 2),
        "h.0.norm.weight": (4,),
        "h.1.up.weight": (6, 4),
        "h.1.up.bias": (6,),
        "h.1.square.weight": (4, 4),
        "h.2.up.weight": (6, 4),
    }
    found = transposed_weights({name: info(name, *shape) for name, shape in tensors.items()})
    assert found == {"h.0.attn.weight", "h.0.proj.weight", "h.0.gate.weight"}
