from __future__ import annotations

import json
import shutil
from functools import partial

import pytest

from mergekit_bayes.checkpoint.header import read_header
from mergekit_bayes.checkpoint.index import open_checkpoint
from mergekit_bayes.errors import CheckpointError, PlanError
from tests.checkpoint.raw_files import write_folder, write_raw

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
SHARDS = {ONE: ["a", "c"], TWO: ["b"]}
MAP = {"a": ONE, "b": TWO, "c": ONE}


@pytest.fixture
def folder_of(tmp_path):
    return partial(write_folder, tmp_path)


def refused(folder, *parts, lines=1):
    """Opening the folder fails with this many one-line problems, which together hold every part."""
    with pytest.raises((CheckpointError, PlanError)) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert message.count("\n") == lines - 1, message
    assert isinstance(caught.value, PlanError) == (lines > 1)
    for part in parts:
        assert part in message


def test_a_single_file_is_opened(folder_of):
    folder = folder_of({"model.safetensors": ["b", "a"]}, config='{"model_type": "llama", "x": Infinity}')
    checkpoint = open_checkpoint(folder)
    assert checkpoint.reference == str(folder)
    assert checkpoint.folder == folder
    assert checkpoint.revision is None
    assert checkpoint.config == {"model_type": "llama", "x": float("inf")}
    assert checkpoint.files == (folder / "model.safetensors",)
    assert list(checkpoint.tensors) == ["a", "b"]
    assert checkpoint.tensors == read_header(folder / "model.safetensors").tensors


def test_shards_are_opened(folder_of):
    folder = folder_of(SHARDS, index=MAP)
    checkpoint = open_checkpoint(folder, reference="org/name", revision="0" * 40)
    assert (checkpoint.reference, checkpoint.revision) == ("org/name", "0" * 40)
    assert checkpoint.files == (folder / ONE, folder / TWO)
    assert {name: info.path.name for name, info in checkpoint.tensors.items()} == MAP
    assert list(checkpoint.tensors) == ["a", "b", "c"]


def test_an_index_of_a_single_file_is_read(folder_of):
    folder = folder_of({"model.safetensors": ["a"]}, index={"a": "model.safetensors"})
    assert list(open_checkpoint(folder).tensors) == ["a"]


def test_what_from_pretrained_saves_is_opened(tiny_checkpoint):
    single, sharded = tiny_checkpoint("llama"), tiny_checkpoint("llama", max_shard_size="8KB")
    assert len(open_checkpoint(sharded).files) > 1
    assert open_checkpoint(single).tensors.keys() == open_checkpoint(sharded).tensors.keys()


def test_other_files_beside_the_weights_are_let_be(folder_of):
    folder = folder_of({"model.safetensors": ["a"], "precision.safetensors": ["a"], "other.safetensors": ["a"]})
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert open_checkpoint(folder).files == (folder / "model.safetensors",)


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("../other/model.safetensors", ["../other/model.safetensors", "expected a file in this folder"]),
        ("/etc/model.safetensors", ["/etc/model.safetensors", "expected a file in this folder"]),
        ("sub/model.safetensors", ["sub/model.safetensors", "expected a file in this folder"]),
        ("..\\model.safetensors", ["expected a file in this folder"]),
        ("model\0.safetensors", [r"model\x00.safetensors"]),
        ("\ud800.safetensors", [r"\ud800.safetensors"]),
        ("x" * 300 + ".safetensors", ["(312 characters)"]),
        ("pytorch_model.bin", ["pytorch_model.bin", "expected the name of a .safetensors file"]),
        ("", ["expected the name of a .safetensors file"]),
        (None, ["None", "expected the name of a .safetensors file"]),
        (3, ["is 3", "expected the name of a .safetensors file"]),
        ([ONE], [ONE, "expected the name of a .safetensors file"]),
    ],
)
def test_a_weight_map_that_names_no_file_of_the_folder_is_refused(folder_of, tmp_path, value, parts):
    folder = folder_of(SHARDS, index={**MAP, "b": value})
    shutil.copytree(folder, tmp_path / "other")
    shutil.copy(folder / TWO, folder / "pytorch_model.bin")
    refused(folder, INDEX, "weight_map[b]", *parts)


def test_every_bad_name_in_a_weight_map_is_listed(folder_of):
    refused(
        folder_of(SHARDS, index={"a": "../a.safetensors", "b": 7, "c": "no.safetensors"}), "[a]", "[b]", "[c]", lines=3
    )


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused(folder_of, tmp_path):
    folder = folder_of(SHARDS, index=MAP)
    (folder / TWO).rename(tmp_path / "elsewhere.safetensors")
    (folder / TWO).symlink_to(tmp_path / "elsewhere.safetensors")
    refused(folder, TWO, "elsewhere.safetensors", "leaves its folder")


def test_a_single_file_and_a_config_that_are_links_out_of_the_folder_are_refused(folder_of, tmp_path):
    folder = folder_of({"model.safetensors": ["a"]})
    for name in ("model.safetensors", "config.json"):
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(f"../{name}")
    refused(folder, "model.safetensors: is a link", "config.json: is a link", lines=2)


def test_links_within_the_folder_and_a_link_to_the_folder_are_followed(folder_of, tmp_path):
    folder = folder_of({"real.safetensors": ["a"]})
    (folder / "model.safetensors").symlink_to("real.safetensors")
    (tmp_path / "link").symlink_to(folder)
    assert list(open_checkpoint(tmp_path / "link").tensors) == ["a"]


@pytest.mark.parametrize("shared", [False, True])
def test_links_into_the_store_of_the_hub_cache_are_followed(folder_of, tmp_path, shared):
    made = folder_of({"model.safetensors": ["a"]})
    blobs, store = tmp_path / "hub/models--org--name/blobs", tmp_path / "hub/blobs"
    snapshot = tmp_path / "hub/models--org--name/snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("model.safetensors", "config.json")):
        digest = f"ab{number:062d}"
        if shared:
            (store / "ab").mkdir(parents=True, exist_ok=True)
            shutil.copy(made / name, store / "ab" / digest)
            (blobs / digest).symlink_to(f"../../blobs/ab/{digest}")
        else:
            shutil.copy(made / name, blobs / digest)
        (snapshot / name).symlink_to(f"../../blobs/{digest}")
    assert list(open_checkpoint(snapshot).tensors) == ["a"]
    (blobs / f"ab{0:062d}").unlink()
    refused(snapshot, "model.safetensors")


def test_a_link_to_a_missing_file_or_to_itself_is_refused(folder_of):
    folder = folder_of(SHARDS, index=MAP)
    for name, target in ((ONE, "nowhere.safetensors"), (TWO, TWO)):
        (folder / name).unlink()
        (folder / name).symlink_to(target)
    refused(folder, ONE, TWO, "is missing", lines=2)


@pytest.mark.parametrize(
    ("files", "index", "parts"),
    [
        ({ONE: ["a", "b"], TWO: ["b"]}, {"a": ONE, "b": TWO}, ["stored twice", ONE, TWO, ": b"]),
        ({ONE: ["a"], TWO: ["b"]}, {"a": TWO, "b": TWO}, [ONE]),
        ({ONE: ["a", "b"], TWO: ["c"]}, {"a": ONE, "b": TWO, "c": TWO}, ["stored in", ONE, "expects", TWO, ": b"]),
        ({ONE: ["a"], TWO: ["b", "x"]}, {"a": ONE, "b": TWO}, ["stored in", TWO, "missing from the weight_map: x"]),
        ({ONE: ["a"], TWO: ["b"]}, {"a": ONE, "b": TWO, "x": TWO}, ["named by the weight_map but missing", TWO, ": x"]),
        ({ONE: ["a"]}, {"a": ONE, "b": TWO}, [f"weight_map[b] is {TWO}, which is missing", "expected"]),
        ({ONE: ["a"], TWO: []}, {"a": ONE, "b": TWO}, ["named by the weight_map but missing", ": b"]),
    ],
)
def test_an_index_and_shards_that_disagree_are_refused(folder_of, files, index, parts):
    refused(folder_of(files, index=index), "folder", *parts)


def test_all_disagreements_of_a_folder_are_listed(folder_of):
    files = {ONE: ["a", "twice", "moved"], TWO: ["b", "twice", "unknown"]}
    index = {"a": ONE, "b": TWO, "twice": TWO, "moved": TWO, "absent": ONE}
    refused(folder_of(files, index=index), ": twice", ": moved", ": unknown", ": absent", lines=4)


def test_long_lists_of_names_are_cut(folder_of):
    names = [f"t{i:05}" for i in range(1000)]
    refused(folder_of({ONE: names, TWO: names}, index=dict.fromkeys(names, ONE)), TWO)
    folder = folder_of({ONE: ["a"], TWO: names}, index={"a": ONE, "x": TWO}, name="other")
    refused(folder, "t00000", "t00019 and 980 more", ": x", lines=2)


def test_faults_of_several_files_are_listed_together(folder_of):
    folder = folder_of(SHARDS, index=MAP, config="[]")
    for name in SHARDS:
        (folder / name).write_bytes(b"")
    refused(folder, f"{ONE}: has 0 bytes", f"{TWO}: has 0 bytes", "config.json", lines=3)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("{", ["not valid JSON"]),
        ("[]", ["[]", "expected a JSON object"]),
        ("{}", ["weight_map is None", "expected an object from tensors to files"]),
        ('{"metadata": {}}', ["weight_map is None"]),
        ('{"metadata": {}, "weight_map": {}}', ["weight_map is {}"]),
        ('{"metadata": {}, "weight_map": ["a"]}', ["weight_map is ['a']"]),
        ('{"metadata": {}, "weight_map": {"a": "x", "a": "y"}}', ["the key a appears twice"]),
        ('{"weight_map": ' * 100_000 + "}" * 100_000, ["nested too deeply"]),
    ],
)
def test_a_broken_index_is_refused(folder_of, text, parts):
    refused(folder_of(SHARDS, index=text), INDEX, *parts)


def test_an_index_without_metadata_is_refused(folder_of):
    refused(folder_of(SHARDS, index=json.dumps({"weight_map": MAP})), INDEX, "metadata is None", "total_size")


@pytest.mark.parametrize("total", [0, 23, 25, "24", 24.5, True])
def test_a_wrong_total_size_is_refused(folder_of, total):
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": MAP})
    refused(folder_of(SHARDS, index=text), INDEX, f"total_size is {total!r}", "expected 24")


@pytest.mark.parametrize(
    "metadata", [{}, {"total_size": None}, {"total_size": 24}, {"total_size": 24.0, "total_parameters": 6}]
)
def test_a_right_or_absent_total_size_is_accepted(folder_of, metadata):
    folder = folder_of(SHARDS, index=json.dumps({"metadata": metadata, "weight_map": MAP}))
    assert list(open_checkpoint(folder).tensors) == ["a", "b", "c"]


def test_a_stale_index_beside_a_single_file_is_refused(folder_of):
    folder = folder_of({"model.safetensors": ["a"]}, index={"a": ONE})
    refused(folder, INDEX, ONE, "missing")


def test_stale_files_beside_new_ones_are_refused(folder_of):
    folder = folder_of(
        {**SHARDS, "model.safetensors": ["a", "b", "c"]}, index=json.dumps({"metadata": {}, "weight_map": MAP})
    )
    refused(folder, "holds model.safetensors beside", "left over")
    folder = folder_of({**SHARDS, "model-00003-of-00003.safetensors": ["z"]}, index=MAP, name="three")
    refused(folder, "model-00003-of-00003.safetensors", "left over")
    folder = folder_of({"model.safetensors": ["a"], TWO: ["z"]}, name="single")
    refused(folder, TWO, "beside model.safetensors")


@pytest.mark.parametrize(
    ("names", "parts"),
    [
        (["pytorch_model.bin"], ["holds only pickles (pytorch_model.bin)", "run code", "save_pretrained"]),
        (["model.pt", "x.ckpt"], ["holds only pickles (model.pt, x.ckpt)"]),
        ([ONE, TWO], [ONE, TWO, f"expected model.safetensors or {INDEX}"]),
        (["model.fp16.safetensors"], ["model.fp16.safetensors", "expected model.safetensors"]),
        (["adapter_config.json", "adapter_model.safetensors"], ["is a PEFT adapter", "model+adapter"]),
        ([], ["holds no weights", "expected model.safetensors"]),
    ],
)
def test_a_folder_without_a_checkpoint_is_refused(folder_of, names, parts):
    folder = folder_of({})
    for name in names:
        (folder / name).write_bytes(b"")
    refused(folder, "folder", *parts)


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (None, ["config.json", "is missing", "transformers"]),
        ("", ["config.json", "not valid JSON"]),
        ("[1]", ["config.json", "[1]", "JSON object"]),
        ('{"a": 1, "a": 2}', ["config.json", "the key a appears twice"]),
        ('{"quantization_config": {"quant_method": "gptq"}}', ["quantization_config", "gptq", "quantised"]),
        ('{"text_config": {"quantization_config": {"bits": 4}}}', ["text_config.quantization_config", "bits"]),
        ('{"compression_config": {"format": "int"}}', ["compression_config"]),
    ],
)
def test_a_bad_config_is_refused(folder_of, config, parts):
    refused(folder_of({"model.safetensors": ["a"]}, config=config), *parts)


def test_a_config_of_absurd_size_is_refused_unread(folder_of):
    folder = folder_of({"model.safetensors": ["a"]})
    with (folder / "config.json").open("wb") as file:
        file.truncate(10**12)  # sparse: takes no space on disk
    refused(folder, "config.json: has 1000000000000 bytes; expected JSON of at most 100000000")


def test_an_empty_quantization_config_means_none(folder_of):
    folder = folder_of({"model.safetensors": ["a"]}, config='{"quantization_config": null}')
    assert open_checkpoint(folder).config == {"quantization_config": None}


def test_a_checkpoint_without_tensors_is_refused(folder_of):
    refused(folder_of({"model.safetensors": []}), "folder", "no tensors", "model.safetensors")


def test_a_bad_shard_is_reported_with_its_tensor(folder_of):
    folder = folder_of(SHARDS, index=MAP)
    content = (folder / TWO).read_bytes()
    (folder / TWO).write_bytes(content[:-1])
    refused(folder, TWO, "tensor b", "truncated")


def test_no_folder_at_all(tmp_path):
    refused(tmp_path / "none", "none: does not exist")
    refused(write_raw(tmp_path, {}), "bad.safetensors: is a file; expected the folder it lies in")
    refused(tmp_path / ("x" * 300), "cannot be listed")
