from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_bayes.checkpoint.adapter import Adapter, LoraModule, is_adapter, open_adapter
from mergekit_bayes.checkpoint.reader import BlockReader
from mergekit_bayes.errors import CheckpointError, MissingTensorError, PlanError, ShapeMismatchError

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"]}
PREFIX = "base_model.model."


def write(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: object) -> Path:
    """An adapter folder; by default of one linear module `h.0.q` with 3 outputs and 5 inputs."""
    folder.mkdir(exist_ok=True)
    factors = {"h.0.q.lora_A.weight": torch.ones(2, 5), "h.0.q.lora_B.weight": torch.ones(3, 2)}
    named = {name if "/" in name else PREFIX + name: t for name, t in (factors if tensors is None else tensors).items()}
    save_file({name.removeprefix("/"): t for name, t in named.items()}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def refused(folder: Path, *parts: str, error: type[Exception] = CheckpointError, lines: int = 1) -> None:
    """Opening fails with this many one-line problems, which together hold every part."""
    with pytest.raises(error if lines == 1 else PlanError) as caught:
        open_adapter(folder)
    message = str(caught.value)
    assert message.count("\n") == lines - 1, message
    for part in parts:
        assert part in message


def update(module: LoraModule) -> torch.Tensor:
    """The update dW as the base stores its weight, from what was read."""
    with BlockReader() as reader:
        product = module.scaling * (reader.read_tensor(module.b).double() @ reader.read_tensor(module.a).double())
    return product.t() if module.transposed or module.kind == "embedding" else product


def test_an_adapter_is_opened(tmp_path):
    tensors = {
        "h.0.q.lora_A.weight": torch.ones(2, 5),
        "h.0.q.lora_B.weight": torch.ones(3, 2),
        "e.lora_embedding_A": torch.ones(2, 7),
        "e.lora_embedding_B": torch.ones(4, 2),
        "e.base_layer.weight": torch.ones(7, 4),
        "score.weight": torch.ones(2, 2),
    }
    folder = write(tmp_path / "a", tensors)
    adapter = open_adapter(folder, reference="org/name", revision="0" * 40)
    assert (adapter.reference, adapter.folder, adapter.revision) == ("org/name", folder, "0" * 40)
    assert adapter.config["r"] == 2
    assert list(adapter.modules) == ["e", "h.0.q"]
    linear, embedding = adapter.modules["h.0.q"], adapter.modules["e"]
    assert (linear.kind, linear.rank, linear.scaling, linear.transposed) == ("linear", 2, 2.0, False)
    assert (linear.a.name, linear.b.name) == (PREFIX + "h.0.q.lora_A.weight", PREFIX + "h.0.q.lora_B.weight")
    assert linear.weight_shape == (3, 5)
    assert (embedding.kind, embedding.rank, embedding.scaling, embedding.transposed) == ("embedding", 2, 2.0, False)
    assert embedding.weight_shape == (7, 4)
    assert list(adapter.saved) == ["score.weight"]
    assert adapter.saved["score.weight"].name == PREFIX + "score.weight"
    assert list(adapter.base_copies) == ["e.weight"]
    assert adapter.base_copies["e.weight"].name == PREFIX + "e.base_layer.weight"
    trained = sorted(PREFIX + name for name in tensors if "base_layer" not in name)
    assert list(adapter.tensors) == trained
    assert adapter.base_tensor("h.0.q") == "h.0.q.weight"
    assert open_adapter(folder).reference == str(folder)


def test_what_an_adapter_folder_is(tmp_path):
    assert is_adapter(write(tmp_path / "a"))
    assert not is_adapter(tmp_path)
    assert not is_adapter(tmp_path / "none")


@pytest.mark.parametrize(
    ("config", "rank", "scaling"),
    [
        ({"r": 2, "lora_alpha": 4}, 2, 2.0),
        ({"r": 2, "lora_alpha": 0.5}, 2, 0.25),
        ({"r": 2, "lora_alpha": 4, "use_rslora": True}, 2, 4 / 2**0.5),
        ({"r": 9, "rank_pattern": {"q": 2}}, 2, 2.0),
        ({"r": 9, "rank_pattern": {"h.0.q": 2}, "alpha_pattern": {"0.q": 6}, "use_rslora": True}, 2, 6 / 2**0.5),
        ({"r": 9, "rank_pattern": {r"h\.\d\.q": 2}}, 2, 2.0),
        ({"r": 9, "rank_pattern": {"k": 5, "q": 2, "h.0.q": 7}}, 2, 2.0),  # the first match wins
        ({"r": 2, "rank_pattern": {"0": 7, "uq": 7, "h": 7, "q.lora_A": 7, ".q": 7}}, 2, 2.0),  # none reaches the end
        ({"r": 2, "alpha_pattern": {"a|b|h.0.q": 8}}, 2, 4.0),
        ({"r": 2, "rank_pattern": {}, "alpha_pattern": None}, 2, 2.0),
    ],
)
def test_rank_and_scaling(tmp_path, config, rank, scaling):
    module = open_adapter(write(tmp_path / "a", **config)).modules["h.0.q"]
    assert (module.rank, module.scaling) == (rank, pytest.approx(scaling, rel=1e-15))


@pytest.mark.parametrize(
    "pattern",
    ["q", "h.0.q", r"h\.\d\.q", "0.q", "uq", "h", "q$", "^h.0.q", "(q)", "q|k", "k|q", ".*", "", ".q", "h.0.q.x"],
)
def test_patterns_match_as_in_peft(tmp_path, pattern):
    from peft.utils.other import get_pattern_key

    patterns = {pattern: 8}
    expected = patterns.get(get_pattern_key(patterns.keys(), "h.0.q"), 4)
    assert open_adapter(write(tmp_path / "a", alpha_pattern=patterns)).modules["h.0.q"].scaling == expected / 2


# --- against PEFT


def saved_by_peft(tiny_checkpoint, folder: Path, model_name: str, dtype: str = "float32", **lora: object):
    """A real adapter with random factors, saved by PEFT and loaded by it again: (PEFT's model, its folder)."""
    import peft
    import transformers

    base = tiny_checkpoint(model_name, dtype=dtype)
    architecture = getattr(transformers, json.loads((base / "config.json").read_text())["architectures"][0])
    adapted = peft.get_peft_model(
        architecture.from_pretrained(base), peft.LoraConfig(**{"r": 4, "lora_alpha": 6, **lora})
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapted.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(architecture.from_pretrained(base), folder), open_adapter(folder)


PEFT_CASES = [
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": "all-linear", "use_rslora": True}),
    (
        "llama",
        {
            "target_modules": ["q_proj", "down_proj"],
            # in the order of the alphabet, which is that of the saved file: the first match wins
            "rank_pattern": {r"1\.mlp\.down_proj": 8, "down_proj": 3, "q_proj": 2},
            "alpha_pattern": {"1.self_attn.q_proj": 1, "model.layers.0.self_attn.q_proj": 16},
            "use_rslora": True,
        },
    ),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": r".*layers\.0.*(q|k)_proj", "init_lora_weights": "gaussian"}),
    ("llama", {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["lm_head"]}),
    ("llama_tied", {"target_modules": ["embed_tokens", "o_proj"]}),
    ("llama_bias", {"target_modules": ["q_proj"]}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),  # PEFT corrects the flag and saves the correction
    ("gpt2", {"target_modules": ["wte", "c_attn"], "fan_in_fan_out": True}),
    ("bert", {"target_modules": ["query", "dense"], "modules_to_save": ["classifier"]}),
    ("bert_masked_lm", {"target_modules": ["query"], "init_lora_weights": "orthogonal"}),
]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("model_name", "lora"), PEFT_CASES)
def test_the_update_is_what_peft_computes(tiny_checkpoint, tmp_path, model_name, lora, dtype):
    model, adapter = saved_by_peft(tiny_checkpoint, tmp_path / "adapter", model_name, dtype, **lora)
    layers = {
        name.removeprefix(PREFIX): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight") and name.startswith(PREFIX)
    }
    assert adapter.modules.keys() == layers.keys()
    for name, layer in layers.items():
        module = adapter.modules[name]
        assert module.weight_shape == tuple(layer.get_base_layer().weight.shape)
        assert (module.rank, module.scaling) == (layer.r["default"], layer.scaling["default"])
        expected = layer.get_delta_weight("default").detach().double()
        tolerance = 1e-6 if expected.dtype == torch.float64 and dtype == "float32" else 2**-7
        torch.testing.assert_close(update(module), expected, rtol=tolerance, atol=1e-7)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_modules_stored_whole(tiny_checkpoint, tmp_path):
    lora = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "model.norm"]}
    model, adapter = saved_by_peft(tiny_checkpoint, tmp_path / "adapter", "llama", **lora)
    assert list(adapter.saved) == ["lm_head.weight", "model.norm.weight"]
    state = model.state_dict()
    with BlockReader() as reader:
        for name, info in adapter.saved.items():
            module, _, parameter = name.rpartition(".")
            trained = state[f"{PREFIX}{module}.modules_to_save.default.{parameter}"]
            assert torch.equal(reader.read_tensor(info), trained)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_copies_of_the_base_are_kept_apart(tiny_checkpoint, tmp_path):
    lora = {"target_modules": ["embed_tokens", "q_proj"]}
    _, adapter = saved_by_peft(tiny_checkpoint, tmp_path / "adapter", "llama", **lora)
    base = load_file(tiny_checkpoint("llama") / "model.safetensors")
    assert adapter.saved == {}
    assert list(adapter.base_copies) == ["model.embed_tokens.weight"]
    with BlockReader() as reader:
        copy = reader.read_tensor(adapter.base_copies["model.embed_tokens.weight"])
    assert torch.equal(copy, base["model.embed_tokens.weight"])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("model_name", "lora", "parts"),
    [
        ("llama", {"use_dora": True, "target_modules": ["q_proj"]}, ["use_dora", "DoRA"]),
        ("llama", {"lora_bias": True, "target_modules": ["q_proj"]}, ["lora_bias"]),
        ("llama_bias", {"bias": "all", "target_modules": ["q_proj"]}, ["bias is 'all'; expected none"]),
        ("llama_bias", {"bias": "lora_only", "target_modules": ["q_proj"]}, ["bias is 'lora_only'"]),
        (
            "llama",
            {"init_lora_weights": "pissa", "target_modules": ["q_proj"]},
            ["'pissa'", "changes the base weights"],
        ),
        (
            "llama",
            {"init_lora_weights": "olora", "target_modules": ["q_proj"]},
            ["'olora'", "changes the base weights"],
        ),
        ("llama", {"trainable_token_indices": [1, 2], "target_modules": ["q_proj"]}, ["trainable_token_indices"]),
        ("llama", {"layer_replication": [[0, 2], [1, 2]], "target_modules": ["q_proj"]}, ["layer_replication"]),
        ("mixtral_fused", {"target_modules": [], "target_parameters": ["experts.down_proj"]}, ["target_parameters"]),
    ],
)
def test_variants_saved_by_peft_are_refused_with_the_reason(tiny_checkpoint, tmp_path, model_name, lora, parts):
    with pytest.raises((CheckpointError, PlanError)) as caught:
        saved_by_peft(tiny_checkpoint, tmp_path / "adapter", model_name, **lora)
    for part in ("adapter_config.json", *parts):
        assert part in str(caught.value)


# --- refusals


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        ({"peft_type": "IA3"}, ["peft_type is 'IA3'", "LORA"]),
        ({"peft_type": None}, ["peft_type is None"]),
        ({"use_dora": True}, ["use_dora is True"]),
        ({"use_qalora": True}, ["use_qalora"]),
        ({"use_bdlora": {"target_modules_bd_a": ["q"]}}, ["use_bdlora", "block-diagonal"]),
        ({"alora_invocation_tokens": [1, 2]}, ["alora_invocation_tokens", "invocation"]),
        ({"arrow_config": {"top_k": 2}}, ["arrow_config"]),
        ({"kasa_config": {"beta": 1}}, ["kasa_config"]),
        ({"monteclora_config": {"n": 1}}, ["monteclora_config"]),
        ({"velora_config": {"n": 1}}, ["velora_config"]),
        ({"use_something_new": True}, ["use_something_new is True", "plain LoRA"]),
        ({"something_config": {"a": 1}}, ["something_config", "plain LoRA"]),
        ({"target_parameters": ["w"]}, ["target_parameters"]),
        ({"trainable_token_indices": {"embed": [1]}}, ["trainable_token_indices"]),
        ({"layer_replication": [[0, 1]]}, ["layer_replication"]),
        ({"init_lora_weights": "pissa_niter_4"}, ["pissa_niter_4"]),
        ({"init_lora_weights": "corda"}, ["corda"]),
        ({"init_lora_weights": "loftq"}, ["loftq"]),
        ({"init_lora_weights": "lora_ga"}, ["lora_ga"]),
        ({"bias": "all"}, ["bias is 'all'"]),
        ({"bias": None}, ["bias is None"]),
        ({"r": 0}, ["r is 0; expected a whole number >= 1"]),
        ({"r": "2"}, ["r is '2'"]),
        ({"r": True}, ["r is True"]),
        ({"lora_alpha": None}, ["lora_alpha is None; expected a finite number"]),
        ({"lora_alpha": float("nan")}, ["lora_alpha is nan"]),
        ({"lora_alpha": float("inf")}, ["lora_alpha is inf"]),
        ({"lora_alpha": 1e300}, ["lora_alpha is 1e+300"]),
        ({"rank_pattern": ["q"]}, ["rank_pattern is ['q']"]),
        ({"rank_pattern": {"q": 1.5}}, ["rank_pattern[q] is 1.5"]),
        ({"rank_pattern": {"q(": 2}}, ["rank_pattern[q(] is not a regular expression"]),
        ({"alpha_pattern": {"q": "4"}}, ["alpha_pattern[q] is '4'"]),
        ({"use_rslora": "yes"}, ["use_rslora is 'yes'; expected true or false"]),
        ({"fan_in_fan_out": 1}, ["fan_in_fan_out is 1"]),
    ],
)
def test_a_configuration_that_is_not_plain_lora_is_refused(tmp_path, config, parts):
    refused(write(tmp_path / "a", **config), "adapter_config.json", *parts)


@pytest.mark.parametrize(
    "config",
    [
        {"eva_config": {"rho": 2.0}, "init_lora_weights": "eva", "corda_config": None, "loftq_config": {}},
        {"use_dora": False, "use_qalora": False, "qalora_group_size": 16, "lora_bias": False, "bias": "none"},
        {"megatron_core": "megatron.core", "megatron_config": None, "peft_version": "9.9", "something_new": 3},
        {"runtime_config": {"ephemeral_gpu_offload": False}, "modules_to_save": ["score"], "lora_dropout": 0.1},
        {"init_lora_weights": False, "target_modules": None, "layer_replication": None},
    ],
)
def test_settings_that_leave_the_rule_alone_are_accepted(tmp_path, config):
    assert list(open_adapter(write(tmp_path / "a", **config)).modules) == ["h.0.q"]


def test_all_faults_of_a_configuration_are_listed(tmp_path):
    folder = write(tmp_path / "a", use_dora=True, lora_bias=True, bias="all", r=0)
    refused(folder, "use_dora", "lora_bias", "bias is 'all'", "r is 0", lines=4)


A, B = "h.0.q.lora_A.weight", "h.0.q.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "parts", "error"),
    [
        ({A: torch.ones(2, 5)}, ["module h.0.q", A, "expected a factor A and a factor B"], MissingTensorError),
        ({B: torch.ones(3, 2)}, ["module h.0.q", B, "expected a factor A and a factor B"], MissingTensorError),
        (
            {A: torch.ones(2, 5), "h.0.q.lora_embedding_B": torch.ones(3, 2)},
            ["module h.0.q", "expected a factor A and a factor B"],
            MissingTensorError,
        ),
        ({A: torch.ones(3, 5), B: torch.ones(3, 3)}, ["its rank is 3; expected 2"], ShapeMismatchError),
        ({A: torch.ones(2, 5), B: torch.ones(3, 4)}, ["(2, 5)", "(3, 4)", "(rank, in_features)"], ShapeMismatchError),
        (
            {A: torch.ones(2, 5, 3, 3), B: torch.ones(3, 2, 1, 1)},
            ["factor A", "(2, 5, 3, 3)", "convolutions"],
            ShapeMismatchError,
        ),
        ({A: torch.ones(10), B: torch.ones(3, 2)}, ["factor A", "(10,)", "gathering"], ShapeMismatchError),
        ({A: torch.ones(2, 5), B: torch.ones(0)}, ["factor B", "(0,)", "gathering"], ShapeMismatchError),
        ({A: torch.ones(2, 5), B: torch.ones(0, 2)}, ["factor B", "(0, 2)"], ShapeMismatchError),
        ({A: torch.ones(2, 5, dtype=torch.int8), B: torch.ones(3, 2)}, [A, "I8", "float"], CheckpointError),
        (
            {A: torch.ones(2, 5), B: torch.ones(3, 2), "h.0.q.lora_magnitude_vector": torch.ones(3)},
            ["lora_magnitude_vector", "unsupported LoRA variant"],
            CheckpointError,
        ),
        (
            {A: torch.ones(2, 5), B: torch.ones(3, 2), "h.0.q.lora_B.bias": torch.ones(3)},
            ["lora_B.bias", "unsupported LoRA variant"],
            CheckpointError,
        ),
        (
            {A: torch.ones(2, 5), B: torch.ones(3, 2), "h.0.q.lora_A.default.weight": torch.ones(3)},
            ["lora_A.default.weight", "unsupported LoRA variant"],
            CheckpointError,
        ),
        ({"/other/q.lora_A.weight": torch.ones(2, 5)}, ["other/q.lora_A.weight", PREFIX], CheckpointError),
        ({}, ["holds no tensors"], CheckpointError),
    ],
)
def test_factors_that_make_no_update_are_refused(tmp_path, tensors, parts, error):
    refused(write(tmp_path / "a", tensors), "adapter_model.safetensors", *parts, error=error)


def test_two_kinds_of_one_factor_are_refused(tmp_path):
    tensors = {A: torch.ones(2, 5), B: torch.ones(3, 2), "h.0.q.lora_embedding_A": torch.ones(2, 5)}
    with pytest.raises((CheckpointError, PlanError), match="expected one factor A"):
        open_adapter(write(tmp_path / "a", tensors))


def test_all_faults_of_the_weights_are_listed(tmp_path):
    tensors = {A: torch.ones(3, 5), B: torch.ones(3, 3), "x.lora_A.weight": torch.ones(2, 2), "y.lora_C": torch.ones(1)}
    refused(write(tmp_path / "a", tensors), "h.0.q", "module x", "y.lora_C", lines=3)


def test_a_pickle_a_missing_file_and_a_full_model_are_refused(tmp_path):
    folder = write(tmp_path / "a")
    shutil.copy(folder / "adapter_model.safetensors", folder / "model.safetensors")
    refused(folder, "holds an adapter and a full model")
    (folder / "model.safetensors").unlink()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    refused(folder, "adapter_model.bin", "run code", "expected adapter_model.safetensors")
    (folder / "adapter_model.bin").unlink()
    refused(folder, "adapter_model.safetensors: is missing")
    refused(tmp_path / "none", "does not exist")


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_link_out_of_the_folder_is_refused(tmp_path, name):
    folder = write(tmp_path / "a")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    refused(folder, name, "leaves its folder")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": 1, "r": 2}'])
def test_a_broken_configuration_is_refused(tmp_path, text):
    folder = write(tmp_path / "a")
    (folder / "adapter_config.json").write_text(text)
    refused(folder, "adapter_config.json")


def test_a_truncated_file_is_refused(tmp_path):
    folder = write(tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    refused(folder, "adapter_model.safetensors", "truncated")


def test_an_adapter_is_frozen(tmp_path):
    adapter = open_adapter(write(tmp_path / "a"))
    assert isinstance(adapter, Adapter)
    with pytest.raises(TypeError):
        adapter.modules["x"] = None
    with pytest.raises(AttributeError):
        adapter.folder = None
