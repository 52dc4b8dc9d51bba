"""What is left on disk: read by PEFT and transformers, byte for byte the same each time, with ordinary modes."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import peft
import pytest
import torch
import transformers

from mergekit_bayes.checkpoint.adapter import open_adapter
from mergekit_bayes.checkpoint.index import open_checkpoint
from mergekit_bayes.checkpoint.sidecar_metadata import METADATA_KEY
from mergekit_bayes.errors import OutputError
from mergekit_bayes.model import FRESH_NAME, load_for_training, save_trained, saved_parameters
from mergekit_bayes.recipe.adapter import AdapterSpec
from mergekit_bayes.recipe.model import ModelSpec
from tests.model.builders import LABELS, load, logits, minilm, perturb
from tests.model.conftest import Bases


def saved(folder: Path, loaded: object, *, seed: int = 1, **options: object) -> Path:
    perturb(loaded.model, seed=seed)  # type: ignore[attr-defined]
    save_trained(loaded.model, loaded.tokenizer, folder, base=loaded.base, **options)  # type: ignore[attr-defined]
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


ADAPTERS = {
    "all linear": AdapterSpec(),
    "patterns": AdapterSpec(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}, use_rslora=True),
    "whole modules": AdapterSpec(target_modules=("v_proj",), modules_to_save=("lm_head", "input_layernorm")),
    "some layers": AdapterSpec(target_modules=("v_proj", "q_proj"), layers_to_transform=(1,), lora_alpha=12.5),
    "a pattern": AdapterSpec(target_modules=r".*\.mlp\..*_proj", exclude_modules=("up_proj",)),
}


@pytest.mark.parametrize("spec", ADAPTERS.values(), ids=ADAPTERS)
def test_peft_loads_an_adapter_to_the_same_logits(base: Bases, tmp_path: Path, spec: AdapterSpec) -> None:
    loaded = load(base("llama"), spec)
    folder = saved(tmp_path / "out", loaded)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base("llama"))
    again = peft.PeftModel.from_pretrained(plain, folder)
    assert torch.equal(logits(again.eval()), logits(loaded.model))
    assert set(contents(folder)) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_peft_finds_the_base_from_the_folder_of_the_run(
    base: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").symlink_to(base("llama"))
    (tmp_path / "recipes").mkdir()
    monkeypatch.chdir(tmp_path)
    for number, (path, recipe_dir) in enumerate([("models/base", None), ("../models/base", Path("recipes"))]):
        loaded = load(path, AdapterSpec(), recipe_dir=recipe_dir)
        folder = saved(tmp_path / f"out{number}", loaded)
        again = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits(again.eval()), logits(loaded.model))


def test_a_hub_model_is_named_by_its_id_and_commit(
    base: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).symlink_to(base("llama"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    loaded = load("org/tiny@main", AdapterSpec())
    assert (loaded.base.path, loaded.base.revision) == ("org/tiny", commit)
    config = json.loads((saved(tmp_path / "out", loaded) / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/tiny", commit)


def test_short_names_say_all_linear(base: Bases, tmp_path: Path) -> None:
    config = json.loads(
        (saved(tmp_path / "out", load(base("llama"), AdapterSpec())) / "adapter_config.json").read_text()
    )
    names = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (config["target_modules"], config["lora_alpha"]) == (names, 16)


def test_the_adapter_s_file_knows_its_base(base: Bases, tmp_path: Path) -> None:
    loaded = load(base("llama"), AdapterSpec())
    adapter = open_adapter(saved(tmp_path / "out", loaded))
    assert json.loads(adapter.metadata[METADATA_KEY]) == {
        "base_fingerprint": loaded.base.fingerprint,
        "base_model": loaded.base.path,
        "base_revision": None,
    }


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "mixtral"])
def test_transformers_loads_a_model_to_the_same_logits(base: Bases, tmp_path: Path, name: str) -> None:
    loaded = load(base(name))
    folder = saved(tmp_path / "out", loaded)
    again, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    assert again.dtype == torch.float32
    assert torch.equal(logits(again.eval()), logits(loaded.model))
    if name != "mixtral":
        assert open_checkpoint(folder).tensors.keys() == open_checkpoint(base(name)).tensors.keys()
    assert "_name_or_path" not in json.loads((folder / "config.json").read_text())


def test_a_large_model_is_written_in_shards(base: Bases, tmp_path: Path) -> None:
    loaded = load(base("llama"))
    folder = saved(tmp_path / "out", loaded, max_shard_bytes=8000)
    assert len(open_checkpoint(folder).files) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(logits(again.eval()), logits(loaded.model))


def test_a_classifier_keeps_its_labels(tmp_path: Path) -> None:
    loaded = load(minilm(), None, labels=LABELS)
    folder = saved(tmp_path / "out", loaded)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert again.config.id2label == dict(enumerate(LABELS))
    assert torch.equal(logits(again.eval()), logits(loaded.model))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer("an oak")["input_ids"] == loaded.tokenizer("an oak")["input_ids"]
    again = transformers.pipeline("text-classification", model=str(folder))("an oak")
    assert again[0]["label"] in LABELS


def test_a_classifier_s_adapter_loads_on_its_base(tmp_path: Path) -> None:
    loaded = load(minilm(), AdapterSpec(target_modules=("query", "value")), labels=LABELS)
    folder = saved(tmp_path / "out", loaded)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(minilm(), num_labels=3)
    assert torch.equal(logits(peft.PeftModel.from_pretrained(plain, folder).eval()), logits(loaded.model))
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["target_modules"]) == (["classifier"], ["query", "value"])
    told = json.loads(open_adapter(folder).metadata[METADATA_KEY])
    assert (told["labels"], told["architecture"]) == (list(LABELS), "BertForSequenceClassification")
    assert told["pad_token_id"] == loaded.tokenizer.pad_token_id


@pytest.mark.parametrize("spec", [AdapterSpec(target_modules=("query",)), None], ids=["adapter", "full"])
def test_where_a_new_head_started_lies_beside_it(tmp_path: Path, spec: AdapterSpec | None) -> None:
    from safetensors.torch import load_file

    loaded = load(minilm(), spec, labels=LABELS)
    fresh = load_file(saved(tmp_path / "out", loaded) / FRESH_NAME)
    assert fresh.keys() == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(fresh[name], loaded.base.fresh[name]) for name in fresh)


@pytest.mark.parametrize("options", [{"load_in_4bit": True}, {"load_in_8bit": True}], ids=["nf4", "int8"])
def test_an_adapter_of_codes_is_an_ordinary_adapter(base: Bases, tmp_path: Path, options: dict[str, object]) -> None:
    coded = load(base("llama"), AdapterSpec(), **options)
    plain = load(base("llama"), AdapterSpec())
    assert contents(saved(tmp_path / "coded", coded)) == contents(saved(tmp_path / "plain", plain))


@pytest.mark.parametrize("spec", [AdapterSpec(), None], ids=["adapter", "full"])
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(base: Bases, tmp_path: Path, spec: AdapterSpec | None, mask: int) -> None:
    with umask(mask):
        folder = saved(tmp_path / "out", load(base("llama"), spec))
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o666 & ~mask}


def write_some(folder: Path) -> None:
    adapter = AdapterSpec(target_modules=("value", "query"), exclude_modules=("pooler", "key"))
    for name, spec in (("adapter", adapter), ("full", None)):
        loaded = load(minilm(), spec, labels=LABELS)
        perturb(loaded.model, seed=1)
        save_trained(loaded.model, loaded.tokenizer, folder / name, base=loaded.base)


@pytest.mark.slow
def test_the_same_weights_give_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    """Here, and in a process that orders sets differently."""
    write_some(tmp_path / "here")
    program = "import sys, pathlib; from tests.model.test_save import write_some; write_some(pathlib.Path(sys.argv[1]))"
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "there")], env=environment, check=True)
    for name in ("adapter", "full"):
        assert contents(tmp_path / "here" / name) == contents(tmp_path / "there" / name)


def test_weights_spread_over_processes_are_gathered(base: Bases, tmp_path: Path) -> None:
    """`fully_shard` on a mesh of one: its parameters are DTensors like those of many."""
    from torch.distributed.fsdp import fully_shard

    plain = load(base("llama"), AdapterSpec())
    expected = contents(saved(tmp_path / "plain", plain))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        spread = load(base("llama"), AdapterSpec())
        perturb(spread.model, seed=1)
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(spread.model, mesh=mesh)
        assert all(hasattr(parameter, "full_tensor") for parameter in saved_parameters(spread.model).values())
        save_trained(spread.model, spread.tokenizer, tmp_path / "out", base=spread.base)
        save_trained(spread.model, spread.tokenizer, tmp_path / "silent", base=spread.base, write=False)
    finally:
        torch.distributed.destroy_process_group()
    assert contents(tmp_path / "out") == expected
    assert not (tmp_path / "silent").exists()


def test_a_full_disk_leaves_no_half_a_file(base: Bases, tmp_path: Path) -> None:
    loaded = load(base("llama"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OutputError, match=r"model\.safetensors: cannot reserve space: File too large; .* needed"):
            save_trained(loaded.model, loaded.tokenizer, tmp_path / "out", base=loaded.base)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_tokenizer_that_cannot_be_written(base: Bases, tmp_path: Path) -> None:
    loaded = load(base("llama"), AdapterSpec())
    (tmp_path / "out" / "tokenizer.json").mkdir(parents=True)
    with pytest.raises(OutputError, match="cannot write the tokenizer: "):
        save_trained(loaded.model, loaded.tokenizer, tmp_path / "out", base=loaded.base)


def test_a_file_where_the_folder_should_go(base: Bases, tmp_path: Path) -> None:
    loaded = load(base("llama"), AdapterSpec())
    (tmp_path / "out").write_text("")
    with pytest.raises(OutputError, match="out: cannot create: File exists"):
        save_trained(loaded.model, loaded.tokenizer, tmp_path / "out", base=loaded.base)


def test_a_spec_is_all_it_takes(base: Bases, tmp_path: Path) -> None:
    """The call as a trainer writes it, with the section read from a recipe."""
    spec = ModelSpec(path=str(base("llama")), dtype="bfloat16")
    loaded = load_for_training(spec, AdapterSpec(r=2), labels=None, seed=0, device=torch.device("cpu"))
    save_trained(loaded.model, None, tmp_path, base=loaded.base)
    assert {info.dtype for info in open_adapter(tmp_path).tensors.values()} == {"F32"}
