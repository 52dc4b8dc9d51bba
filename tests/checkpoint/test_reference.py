from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from mergekit_bayes.checkpoint.adapter import open_adapter
from mergekit_bayes.checkpoint.index import open_checkpoint
from mergekit_bayes.checkpoint.reference import ModelReference, ResolvedFolder, parse_reference, resolve
from mergekit_bayes.errors import CheckpointError
from tests.checkpoint.raw_files import write_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEWER = "f" * 40


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/name", ("org/name", None, None, None)),
        ("gpt2", ("gpt2", None, None, None)),
        ("org/name@v1.0", ("org/name", "v1.0", None, None)),
        ("org/name@refs/pr/3", ("org/name", "refs/pr/3", None, None)),
        ("org/name+org/lora", ("org/name", None, "org/lora", None)),
        ("org/name@v1+org/lora@v2", ("org/name", "v1", "org/lora", "v2")),
        ("org/name+org/lora@v2", ("org/name", None, "org/lora", "v2")),
        ("./models/base", ("./models/base", None, None, None)),
        ("/abs/base+~/lora", ("/abs/base", None, "~/lora", None)),
        ("a folder/with space", ("a folder/with space", None, None, None)),
    ],
)
def test_parse(text, parts):
    assert parse_reference(text) == ModelReference(*parts)


@pytest.mark.parametrize(
    "text", ["", "@v1", "org/name@", "+lora", "base+", "a@b@c", "a+b+c", "a+b@", "a+@v", "a@b+c@d@e"]
)
def test_what_cannot_be_taken_apart_is_refused(text):
    with pytest.raises(CheckpointError, match="can be read in no way; expected model"):
        parse_reference(text)


@pytest.mark.parametrize(
    ("folders", "text", "parts"),
    [
        (["a+b"], "a+b", ("a+b", None, None, None)),
        (["a@b"], "a@b", ("a@b", None, None, None)),
        (["c++", "d"], "c+++d", ("c++", None, "d", None)),
        (["a@1"], "a@1+org/lora@2", ("a@1", None, "org/lora", "2")),
        (["a+b@c+d"], "org/base+a+b@c+d", ("org/base", None, "a+b@c+d", None)),
        (["a", "b"], "a+b", ("a", None, "b", None)),
    ],
)
def test_existing_folders_are_taken_literally(tmp_path, monkeypatch, folders, text, parts):
    for name in folders:
        (tmp_path / name).mkdir()
    assert parse_reference(text, base_dir=tmp_path) == ModelReference(*parts)
    monkeypatch.chdir(tmp_path)
    assert parse_reference(text) == ModelReference(*parts)


def test_two_ways_to_take_apart_are_refused(tmp_path):
    for name in ("a+b", "b+c"):
        (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=r"a\+b\+c: can be read in more than one way"):
        parse_reference("a+b+c", base_dir=tmp_path)


def test_local_folders_from_here_then_from_the_recipe(tmp_path, monkeypatch):
    here, recipe = tmp_path / "here", tmp_path / "recipe"
    for folder in (here / "both", recipe / "both", recipe / "one"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(here)
    assert resolve("both", None, base_dir=recipe) == ResolvedFolder(here / "both", None)
    assert resolve("one", None, base_dir=recipe) == ResolvedFolder(recipe / "one", None)
    assert resolve(str(here / "both"), None, base_dir=recipe).path == here / "both"
    monkeypatch.setenv("HOME", str(recipe))
    assert resolve("~/one", None, base_dir=here).path == recipe / "one"


def test_a_local_folder_has_no_revision(tmp_path):
    (tmp_path / "m").mkdir()
    with pytest.raises(CheckpointError, match=r"m@v1: is the local folder .*/m, which has no revisions"):
        resolve("m", "v1", base_dir=tmp_path)


@pytest.mark.parametrize(
    "reference",
    [
        "./no",
        "../no",
        "/no/such/folder",
        "~/no",
        "a/b/c",
        "no such model",
        "nul\0",
        "x" * 400,
        "~nobody-here/m",
        "a/../b",
        "-x/y",
    ],
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(tmp_path, reference):
    with pytest.raises(CheckpointError, match=r"is no folder .*and no hub id such as org/name") as caught:
        resolve(reference, None, base_dir=tmp_path)
    assert str(caught.value).isprintable()


def test_a_file_is_refused(tmp_path):
    (tmp_path / "m").write_text("")
    with pytest.raises(CheckpointError, match=r"m: is a file; expected the folder"):
        resolve("m", None, base_dir=tmp_path)


# --- the hub, by its cache


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A hub cache as huggingface_hub lays it out, with one model at `COMMIT`."""
    root = tmp_path / "hub"
    add_to_cache(root, tmp_path, {"model.safetensors": ["w"]})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    return root


def add_to_cache(root: Path, tmp_path: Path, files: dict[str, list[str]]) -> None:
    repository = root / "models--org--name"
    made = write_folder(tmp_path, files, name="made")
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    for number, path in enumerate(sorted(made.iterdir())):
        shutil.move(path, repository / "blobs" / f"{number:064x}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number:064x}")
    for name in ("main", "v1"):
        (repository / "refs" / name).write_text(COMMIT)


@pytest.mark.parametrize("revision", [None, "main", "v1", COMMIT])
def test_offline_the_cache_is_used(cache, tmp_path, revision):
    assert constants.HF_HUB_OFFLINE
    resolved = resolve("org/name", revision, base_dir=tmp_path)
    assert resolved == ResolvedFolder(cache / "models--org--name" / "snapshots" / COMMIT, COMMIT)
    assert list(open_checkpoint(resolved.path, revision=resolved.revision).tensors) == ["w"]


@pytest.mark.parametrize(("name", "revision"), [("org/other", None), ("org/name", "v2"), ("org/name", NEWER)])
def test_offline_what_is_not_in_the_cache_is_refused(cache, tmp_path, name, revision):
    with pytest.raises(CheckpointError) as caught:
        resolve(name, revision, base_dir=tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{name}@{revision}: " if revision else f"{name}: ")
    assert f"looked for {Path.cwd() / name} and {tmp_path / name}" in message
    assert "LocalEntryNotFoundError" in message
    assert "HF_HUB_OFFLINE=1" not in message  # it is set already
    assert "\n" not in message


def test_a_local_folder_comes_before_the_hub(cache, tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve("org/name", None, base_dir=tmp_path) == ResolvedFolder(tmp_path / "org" / "name", None)


@pytest.fixture
def online(cache, monkeypatch):
    """The hub reachable, in a fake: `online.newest` is the commit of every branch, an exception fails the look-up."""
    hub = SimpleNamespace(newest=COMMIT, asked=[], downloads=[])

    def model_info(_, repository, *, revision, timeout):
        assert timeout
        hub.asked.append((repository, revision))
        if isinstance(hub.newest, Exception):
            raise hub.newest
        return SimpleNamespace(sha=hub.newest)

    def snapshot_download(repository, *, revision, allow_patterns, ignore_patterns):
        hub.downloads.append((repository, revision, allow_patterns, ignore_patterns))
        return str(cache / "models--org--name" / "snapshots" / COMMIT)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return hub


@pytest.mark.parametrize("revision", [None, "v1"])
def test_online_a_branch_is_looked_up_and_downloaded(online, tmp_path, revision):
    assert resolve("org/name", revision, base_dir=tmp_path).revision == COMMIT
    assert online.asked == [("org/name", revision)]
    assert online.downloads[0][:2] == ("org/name", revision)


def test_a_commit_needs_no_look_up(online, tmp_path):
    online.newest = AssertionError("not to be asked")
    assert resolve("org/name", COMMIT, base_dir=tmp_path).revision == COMMIT
    assert online.asked == []


def test_a_stale_cache_is_not_used_in_silence(online, tmp_path):
    online.newest = NEWER
    with pytest.raises(CheckpointError) as caught:
        resolve("org/name", None, base_dir=tmp_path)
    assert COMMIT in str(caught.value)
    assert NEWER in str(caught.value)


def test_an_unreachable_hub_is_an_error_and_the_way_out_is_named(online, tmp_path):
    online.newest = ConnectionError("no route\nto host")
    with pytest.raises(CheckpointError, match=r"org/name: .*ConnectionError: no route; set HF_HUB_OFFLINE=1") as caught:
        resolve("org/name", None, base_dir=tmp_path)
    assert online.downloads == []
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("model.safetensors", True),
        ("model-00001-of-00002.safetensors", True),
        ("model.safetensors.index.json", True),
        ("adapter_model.safetensors", True),
        ("adapter_config.json", True),
        ("precision.safetensors", True),
        ("precision.safetensors.index.json", True),
        ("config.json", True),
        ("generation_config.json", True),
        ("tokenizer.json", True),
        ("tokenizer.model", True),
        ("merges.txt", True),
        ("vocab.json", True),
        ("chat_template.jinja", True),
        ("modeling_custom.py", True),
        ("pytorch_model.bin", False),
        ("consolidated.safetensors", False),
        ("model.fp16.safetensors", False),
        ("onnx/model.safetensors", False),
        ("original/config.json", False),
        ("README.md", False),
        ("training_args.bin", False),
    ],
)
def test_only_what_a_merge_needs_is_downloaded(online, tmp_path, name, wanted):
    resolve("org/name", None, base_dir=tmp_path)
    _, _, allowed, ignored = online.downloads[0]
    chosen = huggingface_hub.utils.filter_repo_objects([name], allow_patterns=allowed, ignore_patterns=ignored)
    assert list(chosen) == ([name] if wanted else [])


def test_an_adapter_in_the_cache_is_opened(tmp_path, monkeypatch, tiny_adapter):
    snapshot = tmp_path / "hub/models--org--lora/snapshots" / COMMIT
    blobs = tmp_path / "hub/models--org--lora/blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in tiny_adapter("llama", seed=1).iterdir():
        shutil.copy(path, blobs / f"blob of {path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob of {path.name}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    resolved = resolve("org/lora", COMMIT, base_dir=tmp_path)
    assert open_adapter(resolved.path, revision=resolved.revision).modules
