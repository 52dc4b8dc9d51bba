from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.header import read_header
from mergekit_bayes.checkpoint.index import open_checkpoint
from mergekit_bayes.checkpoint.sidecar import (
    SidecarMetadata,
    check_sidecar,
    find_sidecar,
    open_sidecar,
    write_sidecar,
)
from mergekit_bayes.errors import (
    CheckpointError,
    NonFiniteError,
    NonPositivePrecisionError,
    OutputError,
    PlanError,
    SidecarMismatchError,
)
from tests.checkpoint.raw_files import field, write_folder, write_raw

MEAN, BASE = "blake2b-16:" + "1" * 32, "blake2b-16:" + "b" * 32
REQUIRED = {"family": "diagonal", "estimator": "fisher", "space": "full", "mean_fingerprint": MEAN}
IVON = {
    "estimator": "ivon",
    "space": "factor",
    "loss_unit": "token",
    "num_examples": 10_000,
    "ess": 1e7,
    "weight_decay": 1e-6,
    "prior_precision": 0.01,
    "prior_mean": "zero",
    "hess_init": 3e-4,
    "beta2": 0.99999,
    "steps": 1000,
    "batch_size": 32,
    "debiased": True,
    "adapter_scaling": 2.0,
    "base_model": "org/base é\n",
    "base_fingerprint": BASE,
}
FULL = SidecarMetadata(**{**REQUIRED, **IVON})


def text_with(**changes: object) -> str:
    """The JSON of `FULL` with some values changed; a value of ... removes the key."""
    values = {**json.loads(FULL.to_json()), **changes}
    return json.dumps({key: value for key, value in values.items() if value is not ...})


def test_json_has_sorted_keys_and_survives_a_round_trip():
    text = FULL.to_json()
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))
    assert SidecarMetadata.from_json(text, where="f") == FULL
    assert FULL.to_metadata() == {"mergekit_bayes": text}
    assert text.isascii()


def test_defaults_stand_for_what_is_not_known():
    bare = SidecarMetadata(**REQUIRED)
    assert (bare.format, bare.version, bare.scale) == ("mergekit_bayes.precision", 1, "sum")
    assert SidecarMetadata.from_json(json.dumps({**REQUIRED, "format": bare.format, "version": 1}), where="f") == bare


positive = st.floats(min_value=1e-300, max_value=1e300)


@given(
    st.builds(
        SidecarMetadata,
        family=st.just("diagonal"),
        estimator=st.from_regex(r"[a-z][a-z0-9_]{0,63}", fullmatch=True),
        space=st.sampled_from(["factor", "full"]),
        mean_fingerprint=st.from_regex(r"blake2b-16:[0-9a-f]{32}", fullmatch=True),
        loss_unit=st.sampled_from([None, "token", "example"]),
        num_examples=st.none() | st.integers(1, 10**18),
        ess=st.none() | positive,
        prior_precision=st.none() | st.floats(0, 1e300),
        beta2=st.none() | st.floats(0, 1),
        base_model=st.none() | st.text(st.characters(exclude_categories=["Cs"])),
    )
)
def test_any_valid_metadata_survives_a_round_trip(metadata):
    assert SidecarMetadata.from_json(metadata.to_json(), where="f") == metadata


INVALID = [
    ("family", ["Diagonal", "", None, 1, ["diagonal"], "mixture", "isotropic"]),
    ("estimator", ["", "Fisher", "a b", "é", 1, None, "x" * 65, "fisher\n"]),
    ("space", ["update", "", None, 1]),
    ("mean_fingerprint", ["", None, MEAN.upper(), MEAN + "0", MEAN + "\n", "sha256:00", 7]),
    ("base_fingerprint", ["", "blake2b-16:", 7]),
    ("loss_unit", ["tokens", "", 1, True]),
    ("num_examples", [0, -1, 1.0, "10", True, [1]]),
    ("ess", [0, -1.0, "1", True, float("nan"), float("inf")]),
    ("weight_decay", [-1e-9, "0", False, float("nan"), float("inf")]),
    ("prior_precision", [-1, float("-inf"), float("nan"), [1.0]]),
    ("prior_mean", ["", "Base", None]),
    ("hess_init", [-1, "x"]),
    ("beta2", [-0.1, 1.1, "0.9", True, float("nan")]),
    ("steps", [-1, 1.5, True]),
    ("batch_size", [0, 2.0, False]),
    ("debiased", [None, 0, "true"]),
    ("adapter_scaling", [0, -2.0, float("nan")]),
    ("scale", ["mean", None]),
    ("base_model", [1, []]),
]


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in INVALID for value in values])
def test_an_invalid_value_is_refused_and_named(key, value):
    with pytest.raises(CheckpointError, match=rf"{key} is .*expected"):
        SidecarMetadata(**{**REQUIRED, **IVON, key: value})
    with pytest.raises(CheckpointError, match=rf"^some file: sidecar metadata: {key} is .*expected"):
        SidecarMetadata.from_json(text_with(**{key: value}), where="some file")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (text_with(version=2), "version is 2; expected 1; a newer version"),
        (text_with(version="1"), "version is '1'; expected 1"),
        (text_with(version=True), "version is True"),
        (text_with(version=...), "version is None"),
        (text_with(format="other"), "format is 'other'; expected mergekit_bayes.precision"),
        (text_with(format=...), "format is None"),
        (text_with(family=...), "family is missing"),
        (text_with(mean_fingerprint=...), "mean_fingerprint is missing"),
        (text_with(num_exampels=1), "num_exampels is unknown; did you mean num_examples?"),
        (text_with(**{"\x1b[2J": 1}), r"'\x1b[2J' is unknown"),
        (FULL.to_json()[:-1] + ',"ess":1}', "the key ess appears twice"),
        (FULL.to_json()[:-1], "not valid JSON"),
        ("[]", "[]; expected a JSON object"),
        ("", "not valid JSON"),
        ('{"\ud800": 1}', "not UTF-8"),
        ('{"a":' * 100_000, "nested too deeply"),
        (text_with(ess=10**40), "41 digits"),
    ],
)
def test_unreadable_metadata_is_refused(text, message):
    with pytest.raises(CheckpointError) as caught:
        SidecarMetadata.from_json(text, where="some file")
    assert message in str(caught.value)
    assert "some file" in str(caught.value)


def test_all_faults_are_in_one_message():
    with pytest.raises(CheckpointError, match=r"beta2 is 2.*; ess is 0.*; steps is -1"):
        SidecarMetadata(**{**REQUIRED, "beta2": 2, "ess": 0, "steps": -1})


# --- files


@pytest.fixture
def precisions():
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.rand(3, 4, generator=generator) + 0.1,
        "b": (torch.rand(5, generator=generator) + 0.1).bfloat16(),
        "s": torch.tensor(2.0, dtype=torch.float64),
        "none": torch.zeros(0, 2),
    }


def test_write_and_open(tmp_path, precisions):
    path = write_sidecar(tmp_path, precisions, FULL)
    assert path == tmp_path / "precision.safetensors"
    assert [path.name for path in tmp_path.iterdir()] == ["precision.safetensors"]
    stored = load_file(path)
    assert {name: (t.dtype, t.shape) for name, t in stored.items()} == {
        n: (t.dtype, t.shape) for n, t in precisions.items()
    }
    assert all(torch.equal(stored[name], precisions[name]) for name in precisions)
    for given_path in (path, tmp_path):
        sidecar = open_sidecar(given_path)
        assert sidecar.path == path
        assert sidecar.metadata == FULL
        assert list(sidecar.tensors) == ["b", "none", "s", "w"]
    assert find_sidecar(tmp_path) == path


def test_equal_precisions_give_equal_bytes(tmp_path, precisions):
    one = write_sidecar(tmp_path / "one.safetensors", precisions, FULL)
    two = write_sidecar(tmp_path / "two.safetensors", dict(reversed(precisions.items())), FULL)
    assert one.read_bytes() == two.read_bytes()


def test_views_gradients_and_strides_are_written_as_their_values(tmp_path):
    whole = torch.rand(6, 4) + 0.1
    views = {"t": whole.t(), "s": whole[::2, 1], "g": whole.clone().requires_grad_()}
    stored = load_file(write_sidecar(tmp_path, views, FULL))
    assert all(torch.equal(stored[name], views[name].detach()) for name in views)


def test_mode_follows_the_umask_and_an_old_file_is_replaced(tmp_path, precisions):
    (tmp_path / "old").write_text("kept")
    (tmp_path / "precision.safetensors").symlink_to("old")
    before = os.umask(0o027)
    try:
        path = write_sidecar(tmp_path, precisions, FULL)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert not path.is_symlink()
    assert (tmp_path / "old").read_text() == "kept"
    assert open_sidecar(write_sidecar(tmp_path, {"w": torch.ones(1)}, FULL)).tensors.keys() == {"w"}


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (
            torch.tensor([1.0, float("nan"), float("inf")]),
            NonFiniteError,
            "precision of w: 2 of 3 entries are not finite",
        ),
        (
            torch.tensor([1.0, 0.0, -2.0]),
            NonPositivePrecisionError,
            "w: 2 of 3 entries are not positive; the smallest is -2",
        ),
        (torch.ones(2, dtype=torch.float16), CheckpointError, "w: dtype torch.float16; expected float32"),
        (torch.ones(2, dtype=torch.int32), CheckpointError, "w: dtype torch.int32"),
    ],
)
def test_what_no_precision_can_be_is_not_written(tmp_path, precisions, bad, error, message):
    path = write_sidecar(tmp_path, precisions, FULL)
    before = path.read_bytes()
    with pytest.raises(error) as caught:
        write_sidecar(tmp_path, {**precisions, "w": bad}, FULL)
    assert message in str(caught.value)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["precision.safetensors"]


def test_a_failure_while_writing_leaves_the_old_file_alone(tmp_path, precisions, monkeypatch):
    path = write_sidecar(tmp_path, precisions, FULL)
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        write_sidecar(tmp_path, {"w": torch.ones(1)}, FULL)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["precision.safetensors"]


def test_no_single_file_is_put_beside_a_sharded_sidecar(tmp_path, precisions):
    (tmp_path / "precision.safetensors.index.json").write_text("{}")
    with pytest.raises(OutputError, match=r"index\.json: exists"):
        write_sidecar(tmp_path, precisions, FULL)


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4)
types = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


@given(st.dictionaries(names, st.tuples(types, shapes), max_size=6))
def test_safetensors_reads_what_is_written(tmp_path_factory, content):
    tensors = {
        name: torch.arange(1, torch.Size(shape).numel() + 1, dtype=dtype).reshape(shape)
        for name, (dtype, shape) in content.items()
    }
    path = write_sidecar(tmp_path_factory.getbasetemp() / "hypothesis.safetensors", tensors, FULL)
    stored = load_file(path)
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert stored[name].dtype == tensor.dtype
        assert torch.equal(stored[name], tensor)
    for info in read_header(path).tensors.values():
        assert info.offset % {"F64": 8, "F32": 4, "BF16": 2}[info.dtype] == 0


def test_a_sidecar_of_any_name_and_more_header_strings_are_read(tmp_path):
    path = tmp_path / "my precisions.safetensors"
    save_file({"w": torch.ones(2)}, path, {"format": "pt", **FULL.to_metadata()})
    assert open_sidecar(path).metadata == FULL


def sharded(parent: Path, texts: list[str | None]) -> Path:
    """A folder with a sidecar of one tensor per shard; each shard has its own metadata text."""
    parent.mkdir(exist_ok=True)
    files = {f"precision-{i:05d}-of-{len(texts):05d}.safetensors": f"w{i}" for i in range(1, len(texts) + 1)}
    for text, (name, tensor) in zip(texts, files.items(), strict=True):
        metadata = {} if text is None else {"__metadata__": {"mergekit_bayes": text}}
        write_raw(parent, {**metadata, tensor: field("F32", [1], 0, 4)}, b"\0\0\x80?", name=name)
    index = {"metadata": {"total_size": 4 * len(texts)}, "weight_map": {t: name for name, t in files.items()}}
    (parent / "precision.safetensors.index.json").write_text(json.dumps(index))
    return parent


def test_a_sharded_sidecar_is_opened(tmp_path):
    folder = sharded(tmp_path / "f", [FULL.to_json()] * 3)
    sidecar = open_sidecar(folder)
    assert sidecar.path == find_sidecar(folder) == folder / "precision.safetensors.index.json"
    assert list(sidecar.tensors) == ["w1", "w2", "w3"]
    assert open_sidecar(sidecar.path) == sidecar


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([FULL.to_json(), text_with(steps=1)], "its metadata differs"),
        ([FULL.to_json(), None], "precision-00002-of-00002.safetensors: says nothing about its numbers"),
    ],
)
def test_shards_must_say_the_same(tmp_path, texts, message):
    with pytest.raises(CheckpointError) as caught:
        open_sidecar(sharded(tmp_path / "f", texts))
    assert message in str(caught.value)


def test_shards_without_their_index_are_not_overlooked(tmp_path):
    folder = sharded(tmp_path / "f", [FULL.to_json()] * 2)
    (folder / "precision.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"precision-00001.*expected precision\.safetensors\.index\.json"):
        find_sidecar(folder)


def test_a_single_file_beside_shards_is_refused(tmp_path):
    folder = sharded(tmp_path / "f", [FULL.to_json()] * 2)
    save_file({"w": torch.ones(2)}, folder / "precision.safetensors", FULL.to_metadata())
    with pytest.raises(CheckpointError, match="left over"):
        open_sidecar(folder)


def test_no_sidecar(tmp_path):
    assert find_sidecar(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"holds no sidecar; expected precision\.safetensors"):
        open_sidecar(tmp_path)
    with pytest.raises(CheckpointError, match="No such file"):
        open_sidecar(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match="does not exist"):
        find_sidecar(tmp_path / "none")


def test_a_checkpoint_is_no_sidecar(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "precision.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"precision\.safetensors: says nothing about its numbers.*mergekit_bayes"
    ):
        open_sidecar(tmp_path)


def test_types_that_no_precision_has_are_all_listed(tmp_path):
    tensors = {"a": torch.ones(2, dtype=torch.float16), "b": torch.ones(2), "c": torch.ones(2, dtype=torch.int8)}
    save_file(tensors, tmp_path / "precision.safetensors", FULL.to_metadata())
    with pytest.raises(PlanError) as caught:
        open_sidecar(tmp_path)
    first, second = str(caught.value).split("\n")
    assert "tensor a: its dtype is F16; expected one of F32, BF16, F64" in first
    assert "tensor c: its dtype is I8" in second


def test_a_bad_header_is_refused(tmp_path):
    (tmp_path / "precision.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"precision\.safetensors: has 1 bytes"):
        open_sidecar(tmp_path)


# --- does it belong?


@pytest.fixture
def pair(tmp_path):
    """A checkpoint with a buffer, and the tensors of a sidecar for it."""
    means = {"w": torch.randn(3, 4), "b": torch.randn(5).half(), "step": torch.tensor(3)}
    save_file(means, tmp_path / "model.safetensors")
    infos = read_header(tmp_path / "model.safetensors").tensors
    metadata = SidecarMetadata(**{**REQUIRED, "mean_fingerprint": fingerprint(infos), "base_fingerprint": BASE})
    return tmp_path, infos, metadata, {"w": torch.ones(3, 4), "b": torch.ones(5)}


def check(pair, precisions, *, base=BASE, mean=None):
    folder, infos, metadata, _ = pair
    sidecar = open_sidecar(write_sidecar(folder, precisions, metadata))
    found = check_sidecar(
        sidecar, mean_tensors=infos, mean_fingerprint=mean or metadata.mean_fingerprint, base_fingerprint=base
    )
    assert all(type(problem) is SidecarMismatchError and str(sidecar.path) in str(problem) for problem in found)
    return [str(problem).split(": ", 1)[1] for problem in found]


def test_a_sidecar_that_belongs(pair):
    assert check(pair, pair[3]) == []
    assert check(pair, pair[3], base=None) == []
    assert check(pair, {**pair[3], "step": torch.tensor(1.0)}) == []  # a precision nobody needs does no harm


def test_missing_and_unknown_names(pair):
    missing, unknown = check(pair, {"w": torch.ones(3, 4), "x\n": torch.ones(1)})
    assert missing.startswith("holds no precision for b; expected one for every tensor of the checkpoint")
    assert unknown == r"holds precisions for 'x\n'; expected only tensors of the checkpoint"


@pytest.mark.parametrize("changes", [{"prior_precision": 0.5}, {"estimator": "merged"}])
def test_the_prior_stands_in_for_what_was_not_estimated(pair, changes):
    folder, infos, metadata, _ = pair
    prior_only = SidecarMetadata(**{**json.loads(metadata.to_json()), **changes})
    assert check((folder, infos, prior_only, None), {"w": torch.ones(3, 4)}) == []


def test_shapes(pair):
    assert check(pair, {"w": torch.ones(4, 3), "b": torch.ones(1)}) == [
        "precision of b has shape (1,); expected (5,), as in the checkpoint",
        "precision of w has shape (4, 3); expected (3, 4), as in the checkpoint",
    ]


def test_other_weights_and_another_base_show_both_values(pair):
    other = "blake2b-16:" + "c" * 32
    mean, base = check(pair, pair[3], mean=MEAN, base=other)
    assert pair[2].mean_fingerprint in mean
    assert MEAN in mean
    assert BASE in base
    assert other in base


def test_a_sidecar_that_knows_no_base_is_not_compared_with_one(pair):
    folder, infos, metadata, precisions = pair
    unknown = SidecarMetadata(**{**json.loads(metadata.to_json()), "base_fingerprint": None})
    assert check((folder, infos, unknown, precisions), precisions) == []


def test_everything_wrong_is_listed_at_once(pair):
    found = check(pair, {"w": torch.ones(2), "x": torch.ones(1)}, mean=MEAN, base=MEAN)
    assert len(found) == 5


def test_the_sidecar_of_a_model_folder_is_not_part_of_the_model(tmp_path):
    folder = write_folder(tmp_path, {"model.safetensors": ["a"]})
    write_sidecar(folder, {"a": torch.ones(2)}, FULL)
    assert [path.name for path in open_checkpoint(folder).files] == ["model.safetensors"]
    assert open_sidecar(folder).tensors.keys() == {"a"}
