"""A base becomes a model in memory: what it is read as, what is trained, and what is refused."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mergekit_bayes.model
from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.index import open_checkpoint
from mergekit_bayes.errors import CheckpointError, MergekitBayesError, MissingTensorError, ModelError, NonFiniteError
from mergekit_bayes.model import checkpoint_gradients, saved_parameters
from mergekit_bayes.model.lora import adapted_modules, add_lora
from mergekit_bayes.recipe.adapter import AdapterSpec
from tests.model.builders import LABELS, TOKENS, equal, load, logits
from tests.model.conftest import Bases
from tests.tiny_models import VOCABULARY, tiny_model


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def edit(folder: Path, change: object) -> Path:
    """Rewrite `model.safetensors` after `change` has been at its tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)  # type: ignore[operator]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_full_fine_tuning_trains_every_weight_in_float32(base: Bases) -> None:
    loaded = load(base("llama", dtype="bfloat16"))
    expected = tiny_model("llama", dtype=torch.bfloat16)
    parameters = dict(loaded.model.named_parameters())
    assert equal(parameters, {name: value.float() for name, value in expected.named_parameters()})
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in parameters.values())
    assert not loaded.model.training


def test_an_adapter_trains_float32_factors_on_the_base_as_it_is_stored(base: Bases) -> None:
    loaded = load(base("llama", dtype="bfloat16"), AdapterSpec())
    trained = {name for name, parameter in loaded.model.named_parameters() if parameter.requires_grad}
    dtypes = {parameter.dtype for parameter in loaded.model.parameters() if not parameter.requires_grad}
    assert dtypes == {torch.bfloat16}
    assert {parameter.dtype for parameter in saved_parameters(loaded.model).values()} == {torch.float32}
    assert len(trained) == len(saved_parameters(loaded.model)) == 2 * 7 * 2
    assert all(".lora_A." in name or ".lora_B." in name for name in trained)


def test_a_dtype_that_is_asked_for_is_used(base: Bases) -> None:
    loaded = load(base("llama", dtype="bfloat16"), AdapterSpec(), dtype="float32")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


def test_an_adapter_starts_as_its_base(base: Bases) -> None:
    folder = base("llama")
    assert torch.equal(logits(load(folder, AdapterSpec()).model), logits(load(folder).model))


def test_the_base_is_known_by_its_path_and_fingerprint(base: Bases) -> None:
    folder = base("llama")
    identity = load(folder).base
    assert (identity.path, identity.revision) == (str(folder), None)
    assert identity.fingerprint == fingerprint(open_checkpoint(folder).tensors)
    assert identity.fresh == {}


def test_a_relative_path_stays_usable_from_the_current_folder(
    base: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(base("llama"), tmp_path / "models" / "base")
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load("models/base").base.path == "models/base"
    beside_the_recipe = load("../models/base", recipe_dir=Path("recipes")).base.path
    assert Path(beside_the_recipe).samefile("models/base")


def test_factors_depend_on_the_seed_alone(base: Bases) -> None:
    folder = base("llama")
    first = saved_parameters(load(folder, AdapterSpec(), seed=3).model)
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    again = saved_parameters(load(folder, AdapterSpec(), seed=3).model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert equal(first, again)
    assert not equal(first, saved_parameters(load(folder, AdapterSpec(), seed=4).model))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({"r": 2, "lora_alpha": 6}, {"r": 2, "s": 3.0, "modules": 14}),
        ({"r": 4, "lora_alpha": 6, "use_rslora": True}, {"r": 4, "s": 3.0, "modules": 14}),
        ({"target_modules": ("q_proj", "v_proj")}, {"r": 8, "s": 2.0, "modules": 4}),
        ({"target_modules": r".*\.layers\.1\.mlp\..*_proj"}, {"r": 8, "s": 2.0, "modules": 3}),
        ({"target_modules": None}, {"r": 8, "s": 2.0, "modules": 4}),
        ({"exclude_modules": ("down_proj",)}, {"r": 8, "s": 2.0, "modules": 12}),
        ({"target_modules": ("q_proj",), "layers_to_transform": 1}, {"r": 8, "s": 2.0, "modules": 1}),
        (
            {"target_modules": ("q_proj", "k_proj"), "layers_to_transform": (0,), "layers_pattern": "layers"},
            {"r": 8, "s": 2.0, "modules": 2},
        ),
        ({"layers_to_transform": (1,)}, {"r": 8, "s": 2.0, "modules": 7}),
        ({"target_modules": ("embed_tokens",)}, {"r": 8, "s": 2.0, "modules": 1}),
    ],
)
def test_fields_of_the_adapter_reach_peft(base: Bases, spec: dict[str, object], expected: dict[str, float]) -> None:
    model = load(base("llama"), AdapterSpec(**spec)).model
    adapted = adapted_modules(model).values()
    assert len(adapted) == expected["modules"]
    assert {module.r["default"] for module in adapted} == {expected["r"]}
    assert {module.scaling["default"] for module in adapted} == {expected["s"]}


def test_patterns_of_ranks_and_alphas_reach_peft(base: Bases) -> None:
    spec = AdapterSpec(rank_pattern={"q_proj": 2}, alpha_pattern={r"layers\.0\.mlp\.up_proj": 32}, lora_dropout=0.25)
    model = load(base("llama"), spec).model
    adapted = adapted_modules(model)
    ranks = {name: module.r["default"] for name, module in adapted.items()}
    scalings = {name: module.scaling["default"] for name, module in adapted.items()}
    assert {name.rpartition(".")[2] for name, rank in ranks.items() if rank == 2} == {"q_proj"}
    assert [name for name, s in scalings.items() if s == 4.0] == ["model.layers.0.mlp.up_proj"]
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}


@pytest.mark.parametrize("init", [False, "gaussian"])
def test_other_starting_values(base: Bases, init: object) -> None:
    parameters = saved_parameters(load(base("llama"), AdapterSpec(init_lora_weights=init)).model)
    zero = {name.rsplit(".", 2)[1] for name, value in parameters.items() if not value.any()}
    assert zero == (set() if init is False else {"lora_B"})


def test_modules_trained_whole_are_float32_in_a_bfloat16_model(base: Bases) -> None:
    spec = AdapterSpec(target_modules=("q_proj",), modules_to_save=("lm_head", "embed_tokens", "input_layernorm"))
    loaded = load(base("llama", dtype="bfloat16"), spec)
    names = {name.removeprefix("base_model.model.") for name in saved_parameters(loaded.model) if "lora" not in name}
    norms = {f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)}
    assert names == {"lm_head.weight", "model.embed_tokens.weight", *norms}
    assert {parameter.dtype for parameter in saved_parameters(loaded.model).values()} == {torch.float32}
    loaded.model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in saved_parameters(loaded.model).values())
    plain = load(base("llama", dtype="bfloat16"), dtype="bfloat16").model
    assert torch.allclose(logits(loaded.model).float(), logits(plain).float(), atol=0.05)


@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_weights_stored_transposed_need_no_thought(base: Bases, fan_in_fan_out: bool) -> None:
    model = load(base("gpt2"), AdapterSpec(fan_in_fan_out=fan_in_fan_out, target_modules=("c_attn", "c_fc"))).model
    shapes = {tuple(p.shape) for name, p in saved_parameters(model).items() if "c_attn.lora_B" in name}
    assert shapes == {(48, 8)}
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()


@pytest.mark.parametrize("adapter", [None, AdapterSpec(init_lora_weights=False)])
def test_gradients_are_the_same_with_activations_recomputed(base: Bases, adapter: AdapterSpec | None) -> None:
    gradients = []
    for recompute in (False, True):
        model = load(base("llama"), adapter).model
        if recompute:
            checkpoint_gradients(model)
        model.train()
        model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in saved_parameters(model).items()})
    assert equal(*gradients)


def test_an_attention_implementation_is_used(base: Bases) -> None:
    assert load(base("llama"), attn_implementation="eager").model.config._attn_implementation == "eager"


def test_the_tokenizer_pads_with_its_end_of_text_if_it_must(base: Bases) -> None:
    assert load(base("llama")).tokenizer.pad_token == "<eos>"
    assert load(base("llama", pad=True)).tokenizer.pad_token == "<unk>"


def test_loading_is_quiet(base: Bases, capfd: pytest.CaptureFixture[str]) -> None:
    load(base("llama"), AdapterSpec())
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


@pytest.mark.parametrize(("name", "longest"), [("llama", None), ("gpt2", 32), ("bert_masked_lm", 32)])
def test_limits_of_rows(base: Bases, name: str, longest: int | None) -> None:
    loaded = load(base(name), labels=LABELS, task="sequence_classification")
    assert (loaded.longest_row, loaded.vocabulary) == (longest, VOCABULARY)


def test_all_linear_leaves_fused_experts_alone_and_says_so(base: Bases) -> None:
    with pytest.warns(UserWarning, match=r"leaves out 4 fused experts such as model\.layers\.0\.mlp\.experts\.\w+"):
        loaded = load(base("mixtral"), AdapterSpec())
    assert {name.rpartition(".")[2] for name in adapted_modules(loaded.model)} == {
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
    }
    assert not loaded.model.peft_config["default"].target_parameters


# --- refusals


def test_a_tensor_that_is_missing_is_not_drawn_at_random(base: Bases, tmp_path: Path) -> None:
    folder = edit(copied(base("llama"), tmp_path / "m"), lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        MissingTensorError, match=r"lacks model\.layers\.1\.mlp\.up_proj\.weight.*would start at random"
    ):
        load(folder)


def test_a_tensor_without_a_place_is_not_dropped(base: Bases, tmp_path: Path) -> None:
    folder = edit(copied(base("llama"), tmp_path / "m"), lambda t: t.update({"model.extra.weight": torch.ones(3)}))
    with pytest.raises(
        MissingTensorError, match=r"holds model\.extra\.weight, which LlamaForCausalLM has no place for"
    ):
        load(folder)


def test_a_tensor_of_another_shape(base: Bases, tmp_path: Path) -> None:
    folder = edit(copied(base("llama"), tmp_path / "m"), lambda t: t.update({"model.norm.weight": torch.ones(3)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \(3,\); expected \(16,\)"):
        load(folder)


def test_integers_in_place_of_weights(base: Bases, tmp_path: Path) -> None:
    codes = torch.ones(16, 16, dtype=torch.int8)
    folder = copied(base("llama"), tmp_path / "m")
    edit(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": codes}))
    with pytest.raises(CheckpointError, match=r"q_proj\.weight: its dtype is I8; expected a float type"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(base: Bases, tmp_path: Path, value: float) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][1, 2] = value

    folder = edit(copied(base("llama"), tmp_path / "m"), spoil)
    with pytest.raises(NonFiniteError, match=r"layers\.0\.mlp\.up_proj\.weight: 1 of 384 values are NaN or infinite"):
        load(folder, AdapterSpec())


def test_weights_that_float16_cannot_hold(base: Bases, tmp_path: Path) -> None:
    folder = edit(copied(base("llama"), tmp_path / "m"), lambda t: t["model.norm.weight"].fill_(1e6))
    with pytest.raises(NonFiniteError, match=r"as torch\.float16; expected finite weights, or a dtype that can hold"):
        load(folder, AdapterSpec(), dtype="float16")


def test_a_folder_the_reader_of_checkpoints_refuses(base: Bases, tmp_path: Path) -> None:
    folder = copied(base("llama"), tmp_path / "m")
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="perhaps left over from another save"):
        load(folder)


def test_an_adapter_is_no_base(base: Bases, tiny_adapter: Bases) -> None:
    adapter = tiny_adapter("llama", seed=1)
    with pytest.raises(ModelError, match="is or has a PEFT adapter; expected a full model"):
        load(adapter)
    with pytest.raises(ModelError, match="is or has a PEFT adapter; expected a full model"):
        load(f"{base('llama')}+{adapter}")


def test_a_model_without_a_tokenizer(tiny_checkpoint: Bases) -> None:
    with pytest.raises(ModelError, match=r"has no tokenizer; expected tokenizer\.json"):
        load(tiny_checkpoint("llama"))


def test_a_tokenizer_that_cannot_be_read(base: Bases, tmp_path: Path) -> None:
    folder = copied(base("llama"), tmp_path / "m")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="transformers cannot load its tokenizer"):
        load(folder)


def test_a_tokenizer_that_cannot_pad(base: Bases, tmp_path: Path) -> None:
    folder = copied(base("llama"), tmp_path / "m")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(
        ModelError, match=r"neither a padding nor an end-of-text token; expected\s+pad_token or eos_token"
    ):
        load(folder)


def test_a_model_without_weights(base: Bases, tmp_path: Path) -> None:
    folder = copied(base("llama"), tmp_path / "m")
    save_file({"rows": torch.arange(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="holds no tensor of floating point numbers"):
        load(folder, AdapterSpec())


def test_an_architecture_that_cannot_recompute(base: Bases, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(base("llama")).model
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match=r"training\.gradient_checkpointing: LlamaForCausalLM does not support"):
        checkpoint_gradients(model)


def test_libraries_that_are_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *at: None if name == "peft" else found(name, *at))
    with pytest.raises(
        ModelError, match=r"models need peft, not installed here; pip install 'mergekit-bayes\[train\]'"
    ):
        importlib.reload(mergekit_bayes.model)


def test_a_model_of_another_task(base: Bases) -> None:
    with pytest.raises(MergekitBayesError, match=r"lacks .*cls\.predictions.*BertLMHeadModel"):
        load(base("bert"))
    with pytest.raises(ModelError, match=r"transformers cannot load it: Unrecognized configuration class .*ViTConfig"):
        load(base("vit"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "notamodel"}, "transformers cannot load it"),
        (
            {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}},
            "code of its own, which this library never",
        ),
        ({"hidden_size": 24}, r"has shape .*; expected .*, by config\.json"),
    ],
)
def test_a_configuration_that_does_not_fit(
    base: Bases, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    folder = copied(base("llama"), tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(MergekitBayesError, match=message):
        load(folder)


def test_attention_from_the_hub_is_not_run(base: Bases) -> None:
    with pytest.raises(ModelError, match=r"attn_implementation: org/kernel is code from the hub"):
        load(base("llama"), attn_implementation="org/kernel")


def test_an_attention_implementation_nobody_knows(base: Bases) -> None:
    with pytest.raises(ModelError, match=r"transformers cannot load it: .*attn_implementation"):
        load(base("llama"), attn_implementation="telepathy")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"target_modules": ("q_proj", "v_porj")}, r"adapter\.target_modules: v_porj fits no module .* mean v_proj\?"),
        (
            {"target_modules": ("query",)},
            r"adapter\.target_modules: query fits no module of LlamaForCausalLM; expected",
        ),
        ({"target_modules": r".*\.nothing"}, "PEFT cannot add the factors: .*Target modules .* not found"),
        ({"target_modules": ("q_proj",), "exclude_modules": ("q_pro",)}, r"exclude_modules: q_pro fits .* q_proj\?"),
        (
            {"modules_to_save": ("lmhead",)},
            r"adapter\.modules_to_save: lmhead fits no module .* did you mean lm_head\?",
        ),
        ({"rank_pattern": {"q_porj": 2}}, "adapter.rank_pattern: q_porj fits no adapted module"),
        ({"alpha_pattern": {"lm_head": 2}}, "adapter.alpha_pattern: lm_head fits no adapted module"),
        (
            {"target_modules": ("q_proj",), "layers_to_transform": (0, 7)},
            r"adapter\.layers_to_transform: there is no adapted module in layer 7",
        ),
        ({"target_modules": r".*\.q_proj", "layers_to_transform": 0}, "cannot be used when `target_modules` is a str"),
        (
            {"target_modules": ("q_proj", "v_proj"), "exclude_modules": ("v_proj",)},
            "every module that v_proj fits is left out by another key",
        ),
    ],
)
def test_names_that_choose_nothing(base: Bases, spec: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load(base("llama"), AdapterSpec(**spec))


def test_modules_that_merges_do_not_know(base: Bases) -> None:
    with pytest.raises(ModelError, match=r"vit\.embeddings\.patch_embeddings\.projection is a Conv2d; expected linear"):
        add_lora(
            tiny_model("vit"),
            AdapterSpec(target_modules=("projection",)),
            task="sequence_classification",
            whole=(),
            seed=0,
        )
