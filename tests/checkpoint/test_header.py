from __future__ import annotations

import json
import os
import time
from functools import partial
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from mergekit_bayes.checkpoint.dtypes import DTYPES, torch_dtype
from mergekit_bayes.checkpoint.header import element_count, read_header
from mergekit_bayes.errors import CheckpointError
from tests.checkpoint.raw_files import field, raw_bytes, write_raw


@pytest.fixture
def raw_file(tmp_path):
    return partial(write_raw, tmp_path)


TWO = {"a": field("F32", [2], 0, 8), "b": field("U8", [3], 8, 11)}


def refused(path: Path, *parts: str) -> None:
    """The file is refused, in one line that names it and holds every part."""
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    for part in (path.name, *parts):
        assert part in message


def test_a_good_file_is_read(raw_file):
    path = raw_file({"__metadata__": {"k": "v"}, **TWO}, bytes(11))
    header = read_header(path)
    start = path.stat().st_size - 11
    assert header.path == path
    assert header.metadata == {"k": "v"}
    assert list(header.tensors) == ["a", "b"]
    first, second = header.tensors.values()
    assert (first.name, first.dtype, first.shape, first.path) == ("a", "F32", (2,), path)
    assert (first.offset, first.nbytes, first.numel, first.floating) == (start, 8, 2, True)
    assert (second.offset, second.nbytes, second.numel, second.floating) == (start + 8, 3, 3, False)


def test_tensors_come_in_the_order_of_their_bytes(raw_file):
    header = {"b": field("U8", [3], 8, 11), "a": field("F32", [2], 0, 8)}
    assert list(read_header(raw_file(header, bytes(11))).tensors) == ["a", "b"]


def test_a_file_without_tensors_is_read(raw_file):
    assert read_header(raw_file({})).tensors == {}


# each row: what is wrong, header, data, what the message must say (seen and expected)
INCONSISTENT = [
    ("overlap", {**TWO, "b": field("U8", [3], 7, 10)}, 10, ["tensor b", "overlaps"]),
    ("same bytes twice", {**TWO, "b": field("F32", [2], 0, 8)}, 8, ["overlaps"]),
    ("hole", {**TWO, "b": field("U8", [3], 9, 12)}, 12, ["tensor b", "hole", "expected byte"]),
    ("hole at the start", {"b": field("U8", [3], 1, 4)}, 4, ["tensor b", "hole"]),
    ("truncated data", TWO, 10, ["tensor b", "truncated"]),
    ("trailing bytes", TWO, 12, ["the last 1 belong to no tensor"]),
    ("no tensor but bytes", {}, 5, ["the last 5 belong to no tensor"]),
    ("shape and offsets disagree", {"a": field("F32", [3], 0, 8)}, 8, ["tensor a", "span 8", "expected 12"]),
    ("offsets reversed", {"a": field("F32", [2], 8, 0)}, 8, ["tensor a", "[8, 0]", "expected 8"]),
    ("negative offset", {"a": field("F32", [2], -8, 0)}, 8, ["tensor a", "[-8, 0]"]),
    ("unknown dtype", {"a": field("F33", [2], 0, 8)}, 8, ["tensor a", "'F33'", "expected one of"]),
    ("dtype not a text", {"a": field(3, [2], 0, 8)}, 8, ["tensor a", "dtype is 3"]),
    ("packed dtype", {"a": field("F4", [2], 0, 1)}, 1, ["tensor a", "F4", "not supported", "bfloat16"]),
    ("negative size", {"a": field("F32", [-2], 0, 8)}, 8, ["tensor a", "[-2]", ">= 0"]),
    ("two negative sizes", {"a": field("F32", [-2, -1], 0, 8)}, 8, ["tensor a", "[-2, -1]"]),
    ("fractional size", {"a": field("F32", [2.0], 0, 8)}, 8, ["tensor a", "[2.0]"]),
    ("boolean size", {"a": field("F32", [True, 2], 0, 8)}, 8, ["tensor a", "[True, 2]"]),
    ("text for a size", {"a": field("F32", ["2"], 0, 8)}, 8, ["tensor a", "['2']"]),
    ("shape not a list", {"a": field("F32", 2, 0, 8)}, 8, ["tensor a", "shape is 2"]),
    ("shape overflows", {"a": field("U8", [2**40, 2**40], 0, 8)}, 8, ["tensor a", "64 bits"]),
    ("shape overflows to zero", {"a": field("U8", [2**40, 2**40, 0], 0, 0)}, 0, ["tensor a", "64 bits"]),
    ("bytes overflow", {"a": field("F64", [2**62], 0, 0)}, 0, ["tensor a", f"expected {2**65}"]),
    ("three offsets", {"a": {**field("F32", [2], 0, 8), "data_offsets": [0, 4, 8]}}, 8, ["tensor a", "[0, 4, 8]"]),
    ("float offsets", {"a": {**field("F32", [2], 0, 8), "data_offsets": [0.0, 8.0]}}, 8, ["tensor a", "[0.0, 8.0]"]),
    ("no offsets", {"a": {"dtype": "F32", "shape": [2]}}, 8, ["tensor a", "data_offsets, dtype, shape"]),
    ("unknown field", {"a": {**field("F32", [2], 0, 8), "scale": 2}}, 8, ["tensor a", "scale"]),
    ("not an object", {"a": ["F32", [2], [0, 8]]}, 8, ["tensor a", "['F32'"]),
    ("null", {"a": None}, 0, ["tensor a", "None"]),
    ("metadata not an object", {"__metadata__": ["x"]}, 0, ["__metadata__", "['x']"]),
    ("metadata null", {"__metadata__": None}, 0, ["__metadata__", "None"]),
    ("metadata not texts", {"__metadata__": {"k": 1}}, 0, ["__metadata__", "k", "1", "string"]),
    ("metadata nested", {"__metadata__": {"k": {"a": "b"}}}, 0, ["__metadata__", "string"]),
    ("header is a list", [1], 0, ["[1]", "object"]),
    ("header is a number", 7, 0, ["7", "object"]),
]


@pytest.mark.parametrize(
    ("header", "data", "parts"), [row[1:] for row in INCONSISTENT], ids=[r[0] for r in INCONSISTENT]
)
def test_an_inconsistent_header_is_refused(raw_file, header, data, parts):
    refused(raw_file(header, bytes(data)), *parts)


EMPTY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'

# each row: what is wrong, the header's bytes, what the message must say
UNREADABLE = [
    ("not JSON", b"{'a': 1}", ["not valid JSON"]),
    ("empty", b"", ["not valid JSON"]),
    ("cut JSON", b'{"a": {"dtype": "F32", "sha', ["not valid JSON"]),
    ("two documents", b"{}{}", ["not valid JSON"]),
    ("comment", b"{} // hi", ["not valid JSON"]),
    ("raw control character", b'{"a\x01": 1}', ["not valid JSON"]),
    ("byte order mark", b"\xef\xbb\xbf{}", ["not valid JSON"]),
    ("not UTF-8", b'{"\xff": 1}', ["not UTF-8", "byte 2"]),
    ("UTF-8 half character", b'{"\xed\xa0\x80": 1}', ["not UTF-8"]),
    ("UTF-16", '{"a": 1}'.encode("utf-16"), ["not UTF-8"]),
    ("escaped half character", b'{"\\ud800": {"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', ["half a character"]),
    ("half character in metadata", b'{"__metadata__": {"a": "\\ud800"}}', ["half a character"]),
    ("duplicate tensor", b'{"a":' + EMPTY + b',"a":' + EMPTY + b"}", ["the key a appears twice"]),
    ("duplicate of another type", b'{"a":' + EMPTY + b',"a":{"dtype":"I8"}}', ["the key a appears twice"]),
    ("duplicate, escaped", b'{"a":{},"\\u0061":{}}', ["the key a appears twice"]),
    ("duplicate metadata", b'{"__metadata__":{},"__metadata__":{}}', ["the key __metadata__ appears twice"]),
    ("duplicate metadata key", b'{"__metadata__":{"k":"1","k":"2"}}', ["the key k appears twice"]),
    ("duplicate field", b'{"a":{"dtype":"U8","dtype":"U8"}}', ["the key dtype appears twice"]),
    ("deep nesting", b"[" * 200_000 + b"]" * 200_000, ["nested too deeply"]),
    ("deep objects", b'{"a":' * 200_000 + b"1" + b"}" * 200_000, ["nested too deeply"]),
    ("endless number", b'{"a":{"shape":[' + b"9" * 100_000 + b"]}}", ["100000 digits"]),
    ("minus zero", b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', ["tensor a", "[-0.0]"]),
    ("not a number", b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}', ["tensor a", "[nan]"]),
    ("infinity", b'{"a":{"dtype":"U8","shape":[1e999],"data_offsets":[0,0]}}', ["tensor a", "[inf]"]),
]  # fmt: skip


@pytest.mark.parametrize(("header", "parts"), [row[1:] for row in UNREADABLE], ids=[row[0] for row in UNREADABLE])
def test_an_unreadable_header_is_refused(raw_file, header, parts):
    refused(raw_file(header), *parts)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["has 0 bytes", "at least 8"]),
        (b"1234567", ["has 7 bytes", "at least 8"]),
        ((2**63).to_bytes(8, "little") + b"{}", [str(2**63), "100000000"]),
        ((2**64 - 1).to_bytes(8, "little"), [str(2**64 - 1), "100000000"]),
        ((100_000_001).to_bytes(8, "little") + b"{}", ["100000001", "at most 100000000"]),
        ((99_000_000).to_bytes(8, "little") + b"{}", ["99000000", "has only 10 bytes"]),
        ((3).to_bytes(8, "little") + b"{}", ["3 bytes", "only 10"]),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", ["Git LFS pointer", "git lfs pull"]),
        (b"PK\x03\x04\x00\x00\x08\x08" + bytes(100), ["pickle", "safetensors"]),
        (b"\x80\x02}q\x00(X\x01" + bytes(100), ["pickle", "safetensors"]),
        (b"<!DOCTYPE html><html>", ["at most 100000000"]),
    ],
    ids=["empty", "short", "2^63", "2^64-1", "101MB", "99MB", "one short", "lfs", "zip", "pickle", "html"],
)  # fmt: skip
def test_a_file_that_is_something_else_is_refused(tmp_path, content, parts):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    refused(path, *parts)


def test_a_header_of_exactly_640_bytes_is_no_pickle(raw_file):
    path = raw_file(json.dumps({"a": field("U8", [0], 0, 0)}).ljust(640).encode())
    assert path.read_bytes().startswith(b"\x80\x02")  # the length reads like the start of a pickle
    assert list(read_header(path).tensors) == ["a"]


def test_a_folder_a_pipe_and_a_missing_file_are_refused(tmp_path):
    refused(tmp_path, "is a folder", "expected a file")
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(tmp_path / "pipe.safetensors", "neither a file nor a folder")  # and does not wait for a writer
    refused(tmp_path / "none.safetensors", "No such file")
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    refused(tmp_path / "loop.safetensors", "cannot be opened")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_refused(raw_file):
    path = raw_file({})
    path.chmod(0)
    refused(path, "Permission denied")


def test_names_may_be_anything_and_are_printed_escaped(raw_file):
    name = "../../etc/x\n\0\x1b[2J\u202e"
    path = raw_file({name: field("U8", [1], 0, 1)}, bytes(1))
    assert list(read_header(path).tensors) == [name]
    refused(raw_file({name: field("U8", [2], 0, 1)}, bytes(1)), r"../../etc/x\n\x00\x1b[2J\u202e")


def test_a_message_stays_short_whatever_the_name_is(raw_file):
    for header in (
        {"n" * 10**6: field("U8", [2] * 10**5, 0, 1)},
        {"n" * 10**6: {"x": [["y" * 1000] * 1000] * 10}},
        {"__metadata__": {"k" * 10**6: [["y" * 1000] * 1000] * 10}},
    ):
        with pytest.raises(CheckpointError, match=r"\(1000000 characters\)") as caught:
            read_header(raw_file(header, bytes(1)))
        assert len(str(caught.value)) < 2000


def test_an_empty_tensor_may_have_any_other_size(raw_file):
    path = raw_file({"a": field("F32", [0, 2**60], 0, 0), "b": field("F32", [], 0, 4)}, bytes(4))
    tensors = read_header(path).tensors
    assert tensors["a"].shape == (0, 2**60)
    assert tensors["a"].numel == 0
    assert (tensors["b"].shape, tensors["b"].numel) == ((), 1)


def test_element_count_refuses_what_64_bits_cannot_count():
    assert element_count((2, 3, 0)) == 0
    assert element_count(()) == 1
    assert element_count((2**63 - 1,)) == 2**63 - 1
    for shape in [(2**63,), (0, 2**63), (2**32, 2**32), (2**32, 2**32, 0)]:
        with pytest.raises(CheckpointError, match="64 bits"):
            element_count(shape)


def test_a_header_of_100_000_tensors_takes_seconds_at_most(raw_file):
    header = {f"model.layers.{i}.mlp.up_proj.weight": field("F32", [1], 4 * i, 4 * i + 4) for i in range(100_000)}
    path = raw_file(header, bytes(400_000))
    start = time.process_time()
    assert len(read_header(path).tensors) == 100_000
    assert time.process_time() - start < 4  # 1 to 2 s where it was measured


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4)
tensor_sets = st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPES)), shapes), max_size=6)


@given(tensor_sets, st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"])), max_size=3))
def test_what_safetensors_writes_is_read(tmp_path_factory, tensors, metadata):
    content = {name: torch.zeros(shape, dtype=torch_dtype(dtype)) for name, (dtype, shape) in tensors.items()}
    path = tmp_path_factory.getbasetemp() / "hypothesis.safetensors"
    path.write_bytes(save(content, metadata or None))  # {} and {} together make it write broken JSON
    header = read_header(path)
    assert header.metadata == metadata
    assert {name: (info.dtype, list(info.shape)) for name, info in header.tensors.items()} == tensors
    assert sum(info.nbytes for info in header.tensors.values()) == sum(t.nbytes for t in content.values())


GOOD = raw_bytes(
    {
        "__metadata__": {"format": "pt", "k": '{"a": [1, 2]}'},
        "h.0.weight": field("BF16", [10, 3], 0, 60),
        "h.0.bias": field("I64", [1], 60, 68),
        "step": field("F32", [], 68, 72),
        "none": field("U8", [0, 7], 72, 72),
    },
    bytes(range(72)),
)
header_end = len(GOOD) - 72


@given(st.data())
def test_a_damaged_header_is_refused_or_read_as_safetensors_reads_it(tmp_path_factory, data):
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, header_end - 1))
        change = data.draw(st.sampled_from(["set", "swap", "insert", "delete"]))
        # likely characters first: damage that still parses is what tells two parsers apart
        byte = data.draw(st.sampled_from(b'-0123456789.eE,:"{}[] \\utrfalsn') | st.integers(0, 255))
        if change == "set":
            content[place] = byte
        elif change == "swap":
            content[place], content[place - 1] = content[place - 1], content[place]
        elif change == "insert":
            content.insert(place, byte)
        else:
            del content[place]
    if data.draw(st.booleans()):  # else the length of an inserted or deleted byte is wrong as well
        content[:8] = (len(content) - 72 - 8).to_bytes(8, "little")
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except CheckpointError as error:
        message = str(error)
    else:
        message = None
    if message is not None:
        assert path.name in message
        assert message.isprintable()
        return
    with safetensors.safe_open(path, "pt") as file:
        assert sorted(file.keys()) == sorted(header.tensors)
        assert (file.metadata() or {}) == header.metadata
        for name, info in header.tensors.items():
            part = file.get_slice(name)
            assert (part.get_dtype(), tuple(part.get_shape())) == (info.dtype, info.shape)
            stored = bytes(content[info.offset : info.offset + info.nbytes])
            assert (
                file.get_tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes() == stored if info.nbytes else True
            )
