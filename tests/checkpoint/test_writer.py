"""Laying out and writing shards: what any reader gets back, whole files or none, equal bytes."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from mergekit_bayes.checkpoint import disk
from mergekit_bayes.checkpoint.dtypes import DTYPES, torch_dtype
from mergekit_bayes.checkpoint.writer import (
    ShardLayout,
    ShardWriter,
    TensorEntry,
    _Spans,
    index_json,
    index_name,
    layout_shards,
)
from mergekit_bayes.errors import OutputError

GB = 10**9
LIMITED = settings(
    deadline=None,
    max_examples=60,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def random_tensor(entry: TensorEntry, seed: int) -> torch.Tensor:
    """Every bit pattern is fair: a writer must not care about values."""
    generator = torch.Generator().manual_seed(seed)
    if entry.dtype == "BOOL":
        return torch.randint(0, 2, entry.shape, generator=generator).bool()
    raw = torch.randint(0, 256, (entry.nbytes,), dtype=torch.uint8, generator=generator)
    return raw.view(torch_dtype(entry.dtype)).reshape(entry.shape)


def same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    bits = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return left.shape == right.shape and left.dtype == right.dtype and torch.equal(*bits)


def write_whole(folder: Path, layouts: tuple[ShardLayout, ...], tensors: dict[str, torch.Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    for layout in layouts:
        with ShardWriter(folder / layout.filename, layout) as writer:
            for entry in layout.entries:
                writer.write(entry.name, 0, tensors[entry.name].reshape(-1))


def one_shard(*entries: TensorEntry) -> ShardLayout:
    (layout,) = layout_shards(entries, max_shard_bytes=GB)
    return layout


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
entry_sets = st.lists(
    st.builds(
        TensorEntry,
        names,
        st.sampled_from(sorted(DTYPES)),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
    ),
    max_size=8,
    unique_by=lambda entry: entry.name,
)


# Layout


@pytest.mark.parametrize(
    ("sizes", "limit", "shards"),
    [
        ([], 10, [[]]),
        ([10], 10, [[10]]),
        ([11], 10, [[11]]),
        ([5, 5, 1], 10, [[5, 5], [1]]),
        ([5, 6, 1], 10, [[5], [6, 1]]),
        ([20, 1, 20, 1], 10, [[20], [1], [20], [1]]),
        ([0, 0, 10, 0], 10, [[0, 0, 10, 0]]),
        ([3, 3, 3, 3], 6, [[3, 3], [3, 3]]),
        ([1, 1, 1], 1, [[1], [1], [1]]),
    ],
)
def test_shards_are_filled_greedily_in_order(sizes: list[int], limit: int, shards: list[list[int]]) -> None:
    entries = [TensorEntry(f"t{i}", "U8", (size,)) for i, size in enumerate(sizes)]
    layouts = layout_shards(entries, max_shard_bytes=limit)
    assert [[entry.nbytes for entry in layout.entries] for layout in layouts] == shards
    assert [entry.name for layout in layouts for entry in layout.entries] == [entry.name for entry in entries]


@pytest.mark.parametrize("stem", ["model", "adapter_model", "precision"])
def test_names_of_shards_are_the_standard_ones(stem: str) -> None:
    entries = [TensorEntry(f"t{i}", "F32", (4,)) for i in range(12)]
    single = layout_shards(entries, stem=stem, max_shard_bytes=GB)
    several = layout_shards(entries, stem=stem, max_shard_bytes=16)
    assert [layout.filename for layout in single] == [f"{stem}.safetensors"]
    assert several[0].filename == f"{stem}-00001-of-00012.safetensors"
    assert several[11].filename == f"{stem}-00012-of-00012.safetensors"
    assert index_name(stem) == f"{stem}.safetensors.index.json"


def test_the_header_has_metadata_first_and_sorted_and_ends_on_eight_bytes() -> None:
    entries = [TensorEntry("ü", "BF16", (2, 3)), TensorEntry("a", "F32", ())]
    (layout,) = layout_shards(entries, max_shard_bytes=GB, metadata={"z": "1", "b": "2", "m": "ß"})
    text = layout.header[8:]
    assert int.from_bytes(layout.header[:8], "little") == len(text)
    assert len(layout.header) % 8 == 0
    assert text.startswith('{"__metadata__":{"b":"2","m":"ß","z":"1"},'.encode())
    assert json.loads(text)["ü"] == {"dtype": "BF16", "shape": [2, 3], "data_offsets": [4, 16]}
    assert layout.nbytes == len(layout.header) + 16


def test_metadata_says_torch_unless_told_otherwise() -> None:
    assert json.loads(one_shard().header[8:]) == {"__metadata__": {"format": "pt"}}
    (bare,) = layout_shards([], max_shard_bytes=1, metadata={})
    assert json.loads(bare.header[8:]) == {"__metadata__": {}}


def test_every_tensor_is_aligned_to_its_element_size_without_gaps() -> None:
    entries = [
        TensorEntry("a", "U8", (3,)),
        TensorEntry("b", "F32", (1,)),
        TensorEntry("c", "BF16", (5,)),
        TensorEntry("d", "I64", (1,)),
        TensorEntry("e", "F32", (1,)),
    ]
    layout = one_shard(*entries)
    assert [entry.name for entry in layout.entries] == ["d", "b", "e", "c", "a"]
    for entry in layout.entries:
        assert (len(layout.header) + layout.offsets[entry.name]) % entry.itemsize == 0
    assert layout.data_bytes == sum(entry.nbytes for entry in entries)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TensorEntry("t", "F33", (1,)), "unknown dtype 'F33'"),
        (lambda: TensorEntry("t", "F32", (2, -1)), "negative size"),
        (lambda: TensorEntry("__metadata__", "F32", ()), "__metadata__"),
        (lambda: layout_shards([TensorEntry("t", "U8", ())] * 2, max_shard_bytes=1), "two .* called t"),
        (lambda: layout_shards([], max_shard_bytes=0), "must be positive"),
        (lambda: layout_shards([], max_shard_bytes=-5), "-5"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_a_header_longer_than_readers_accept_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_bayes.checkpoint.layout.MAX_HEADER_BYTES", 200)
    entries = [TensorEntry(f"t{i}", "F32", (4,)) for i in range(4)]
    with pytest.raises(ValueError, match="header of more than 100 MB"):
        layout_shards(entries, max_shard_bytes=GB)


def test_the_index_is_the_standard_one_with_sorted_keys() -> None:
    entries = [TensorEntry(name, "F32", (2,)) for name in ("c", "a", "b")]
    layouts = layout_shards(entries, max_shard_bytes=16)
    text = index_json(layouts, {"note": "x"})
    assert json.loads(text) == {
        "metadata": {"note": "x", "total_size": 24},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
            "c": "model-00001-of-00002.safetensors",
        },
    }
    assert list(json.loads(text)["weight_map"]) == ["a", "b", "c"]
    assert text.endswith(b"}\n")


@LIMITED
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)).map(sorted), max_size=12))
def test_spans_are_taken_once(spans: list[list[int]]) -> None:
    taken: set[int] = set()
    claims = _Spans()
    for start, end in spans:
        wanted = set(range(start, end))
        assert claims.claim(start, end) == (not wanted & taken)
        taken |= wanted if not wanted & taken else set()


# Round trips


@LIMITED
@given(entries=entry_sets, limit=st.integers(1, 200), seed=st.integers(0, 2**16), data=st.data())
def test_any_tensors_written_in_any_order_and_cut_come_back(
    tmp_path: Path, entries: list[TensorEntry], limit: int, seed: int, data: st.DataObject
) -> None:
    tensors = {entry.name: random_tensor(entry, seed) for entry in entries}
    layouts = layout_shards(entries, max_shard_bytes=limit, metadata={"k": "v"})
    write_whole(tmp_path, layouts, tensors)
    for layout in layouts:
        blocks = []
        for entry in layout.entries:
            cuts = data.draw(st.lists(st.integers(0, entry.numel), max_size=4))
            edges = sorted({0, entry.numel, *cuts})
            blocks += [(entry, start, end) for start, end in pairwise(edges)]
        random.Random(seed).shuffle(blocks)
        target = tmp_path / f"cut-{layout.filename}"
        with ShardWriter(target, layout) as writer:
            for i, (entry, start, end) in enumerate(blocks):
                block = tensors[entry.name].reshape(-1)[start:end]
                raw = bytes(block.clone().view(torch.uint8).tolist())
                writer.write(entry.name, start, raw if i % 2 else block)
        assert target.read_bytes() == (tmp_path / layout.filename).read_bytes()
        assert target.stat().st_size == layout.nbytes
        with safe_open(target, "pt") as file:
            assert file.metadata() == {"k": "v"}
            assert set(file.keys()) == {entry.name for entry in layout.entries}
            assert all(same_bits(file.get_tensor(name), tensors[name]) for name in file.keys())  # noqa: SIM118


def test_many_threads_write_one_file_like_one_thread(tmp_path: Path) -> None:
    layout = one_shard(TensorEntry("w", "BF16", (257, 131)), TensorEntry("v", "F32", (9973,)))
    tensors = {entry.name: random_tensor(entry, 3) for entry in layout.entries}
    write_whole(tmp_path / "one", (layout,), tensors)
    blocks = [(e, start, min(start + 61, e.numel)) for e in layout.entries for start in range(0, e.numel, 61)]
    random.Random(0).shuffle(blocks)
    target = tmp_path / layout.filename
    with ShardWriter(target, layout) as writer, ThreadPoolExecutor(8) as pool:
        jobs = [
            pool.submit(writer.write, entry.name, start, tensors[entry.name].reshape(-1)[start:end])
            for entry, start, end in blocks
        ]
        for job in jobs:
            job.result()
    assert target.read_bytes() == (tmp_path / "one" / layout.filename).read_bytes()


def test_tensor_bytes_do_not_depend_on_the_shard_limit(tmp_path: Path) -> None:
    dtypes = ["F32", "BF16", "U8", "F64"] * 3
    entries = [TensorEntry(f"t{i}", dtype, (i, 3)) for i, dtype in enumerate(dtypes)]
    tensors = {entry.name: random_tensor(entry, 5) for entry in entries}
    for limit in (1, 64, GB):
        layouts = layout_shards(entries, max_shard_bytes=limit)
        write_whole(tmp_path / str(limit), layouts, tensors)
        loaded: dict[str, torch.Tensor] = {}
        for layout in layouts:
            loaded |= load_file(tmp_path / str(limit) / layout.filename)
        assert all(same_bits(loaded[name], tensor) for name, tensor in tensors.items())
        assert len(loaded) == len(entries)


def test_scalars_empty_tensors_and_empty_files_are_written(tmp_path: Path) -> None:
    layout = one_shard(TensorEntry("scalar", "F64", ()), TensorEntry("empty", "F32", (0, 7)))
    with ShardWriter(tmp_path / "a.safetensors", layout) as writer:
        writer.write("scalar", 0, torch.tensor([2.5], dtype=torch.float64))
        writer.write("empty", 0, torch.empty(0))
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded["scalar"].item() == 2.5
    assert loaded["empty"].shape == (0, 7)
    with ShardWriter(tmp_path / "b.safetensors", one_shard()):
        pass
    assert load_file(tmp_path / "b.safetensors") == {}


# What must not be written


@pytest.mark.parametrize(
    ("start", "block", "message"),
    [
        (0, torch.zeros(7), "do not fit"),
        (5, torch.zeros(2), "do not fit"),
        (-1, torch.zeros(1), "do not fit"),
        (3, torch.zeros(1), "written before"),
        (1, torch.zeros(2), "written before"),
        (1, torch.zeros(4), "written before"),
        (0, torch.zeros(1, dtype=torch.float16), "torch.float16 for a tensor of dtype F32"),
        (0, torch.zeros(1, 1), "one-dimensional"),
        (0, torch.zeros(4)[::2], "contiguous"),
        (0, torch.zeros(1, device="meta"), "CPU"),
        (0, b"abc", "no whole number"),
        (0, bytes(28), "do not fit"),
    ],
)
def test_a_block_that_does_not_fit_is_refused(
    tmp_path: Path, start: int, block: torch.Tensor | bytes, message: str
) -> None:
    writer = ShardWriter(tmp_path / "x.safetensors", one_shard(TensorEntry("t", "F32", (2, 3))))
    writer.write("t", 2, torch.ones(2))
    with pytest.raises(ValueError, match=message):
        writer.write("t", start, block)
    writer.write("t", 0, torch.ones(2))
    writer.write("t", 4, torch.ones(2))
    writer.close()
    assert torch.equal(load_file(tmp_path / "x.safetensors")["t"], torch.ones(2, 3))


def test_a_tensor_nobody_planned_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="no tensor is called other"),
        ShardWriter(tmp_path / "x.safetensors", one_shard()) as writer,
    ):
        writer.write("other", 0, torch.ones(1))


@pytest.mark.parametrize("missing", [0, 1, 5, 6])
def test_a_file_with_holes_is_never_left_behind(tmp_path: Path, missing: int) -> None:
    layout = one_shard(TensorEntry("t", "F32", (6,)), TensorEntry("u", "U8", (0,)))
    writer = ShardWriter(tmp_path / "x.safetensors", layout)
    for i in range(6):
        if i != missing:
            writer.write("t", i, torch.ones(1))
    if missing == 6:
        writer.close()
        assert (tmp_path / "x.safetensors").exists()
    else:
        with pytest.raises(OutputError, match=r"not everything was written: t \(4 of 24 bytes\)"):
            writer.close()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_an_exception_removes_the_file(tmp_path: Path, failure: type[BaseException]) -> None:
    layout = one_shard(TensorEntry("t", "F32", (1,)))
    with pytest.raises(failure), ShardWriter(tmp_path / "x.safetensors", layout):
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_closing_or_aborting_again_changes_nothing_and_writing_then_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "x.safetensors", one_shard(TensorEntry("t", "F32", (1,))))
    writer.write("t", 0, torch.ones(1))
    writer.close()
    writer.abort()
    assert load_file(tmp_path / "x.safetensors")["t"].item() == 1
    with pytest.raises(ValueError, match="already closed"):
        writer.close()
    assert (tmp_path / "x.safetensors").exists()


def test_what_stood_under_the_name_is_replaced_and_never_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("keep")
    (tmp_path / "link.safetensors").symlink_to(victim)
    hard = tmp_path / "hard.safetensors"
    hard.hardlink_to(victim)
    for name in ("link.safetensors", "hard.safetensors"):
        with ShardWriter(tmp_path / name, one_shard()):
            pass
        assert not (tmp_path / name).is_symlink()
    assert victim.read_text() == "keep"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002, 0o027])
def test_file_modes_follow_the_umask(tmp_path: Path, umask: int) -> None:
    script = f"""
    import os, pathlib
    from mergekit_bayes.checkpoint.disk import write_atomically
    from mergekit_bayes.checkpoint.writer import ShardWriter, layout_shards
    os.umask({umask})
    ShardWriter(pathlib.Path("x.safetensors"), layout_shards([], max_shard_bytes=1)[0]).close()
    write_atomically(pathlib.Path("y.json"), b"[]")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=tmp_path, check=True)
    assert [p.stat().st_mode & 0o777 for p in sorted(tmp_path.iterdir())] == [0o666 & ~umask] * 2


def test_layout_and_writer_load_without_torch() -> None:
    script = "import sys, mergekit_bayes.checkpoint.writer; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


# Disks that refuse


def test_a_full_disk_is_met_before_the_first_block(small_disk: Path) -> None:
    layout = one_shard(TensorEntry("t", "F32", (2_000_000,)))
    with pytest.raises(OutputError, match=r"big.*: cannot reserve space.*8,0.*needed; .* free") as caught:
        ShardWriter(small_disk / "big.safetensors", layout)
    assert "free some space" in str(caught.value)
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_later_leaves_no_file(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    layout = one_shard(TensorEntry("t", "F32", (2_000_000,)))
    with (
        pytest.raises(OutputError, match=r"big\.safetensors: cannot write: No space left"),
        ShardWriter(small_disk / "big.safetensors", layout) as writer,
    ):
        writer.write("t", 0, torch.ones(2_000_000))
    assert list(small_disk.iterdir()) == []


def unsupported(*_: int) -> None:
    raise OSError(errno.EOPNOTSUPP, "Operation not supported")


@pytest.mark.parametrize("preallocate", [True, False])
def test_a_file_size_limit_is_reported(tmp_path: Path, preallocate: bool) -> None:
    script = f"""
    import errno, os, pathlib, resource, torch
    from mergekit_bayes.checkpoint.writer import ShardWriter, TensorEntry, layout_shards
    from mergekit_bayes.errors import OutputError
    if not {preallocate}:
        del os.posix_fallocate
        os.ftruncate = lambda *_: None
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    (layout,) = layout_shards([TensorEntry("t", "F32", (5000,))], max_shard_bytes=10**9)
    try:
        with ShardWriter(pathlib.Path("x.safetensors"), layout) as writer:
            writer.write("t", 0, torch.ones(5000))
    except OutputError as error:
        print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    told = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert "x.safetensors: cannot " in told
    assert "File too large; 20,1" in told
    assert "max_shard_size" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_file_systems_without_preallocation_still_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    layout = one_shard(TensorEntry("t", "BF16", (5,)))
    write_whole(tmp_path, (layout,), {"t": torch.arange(5).bfloat16()})
    assert load_file(tmp_path / layout.filename)["t"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("call", ["pwrite", "fsync", "posix_fallocate"])
def test_a_failing_device_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    layout = one_shard(TensorEntry("t", "F32", (1,)))
    with pytest.raises(OutputError, match=r"model\.safetensors: cannot .*Input/output error.*device"):
        write_whole(tmp_path, (layout,), {"t": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []


def test_writes_cut_short_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: real(fd, data[:7], offset))
    layout = one_shard(TensorEntry("t", "F32", (33,)))
    write_whole(tmp_path, (layout,), {"t": torch.arange(33.0)})
    assert load_file(tmp_path / layout.filename)["t"].tolist() == list(range(33))


def test_a_disk_that_writes_nothing_is_an_error_and_no_endless_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwrite", lambda *_: 0)
    with pytest.raises(OutputError, match="wrote nothing"):
        ShardWriter(tmp_path / "x.safetensors", one_shard())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["absent", "file"])
def test_a_folder_that_is_not_there_is_reported(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match=r"x\.safetensors: cannot create"):
        ShardWriter(tmp_path / place / "x.safetensors", one_shard())


# Small files and words


def test_a_failed_atomic_write_keeps_the_old_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.json"
    disk.write_atomically(target, b"old")

    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError, match=r"a\.json: cannot write: Input/output error; 3 bytes needed"):
        disk.write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_an_atomic_write_never_shows_half_of_it(tmp_path: Path) -> None:
    disk.write_atomically(tmp_path / "a.json", b"old")
    with (tmp_path / "a.json").open("rb") as reader:
        disk.write_atomically(tmp_path / "a.json", b"brand new")
        assert reader.read() == b"old"
    assert (tmp_path / "a.json").read_bytes() == b"brand new"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1,000 bytes (1.0 kB)"),
        (2_500_000, "2,500,000 bytes (2.5 MB)"),
        (3 * 10**18, "3,000,000,000,000,000,000 bytes (3000.0 PB)"),
    ],
)
def test_byte_counts_read_well(count: int, text: str) -> None:
    assert disk.format_bytes(count) == text


def test_free_space_is_asked_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert disk.nearest_existing(tmp_path / "a" / "b") == tmp_path
    assert disk.free_bytes(tmp_path / "a" / "b") > 0


def test_blocks_are_sent_to_the_disk_while_the_next_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The final fsync then finds little to do; a system without the call, or one that refuses it, writes the same."""
    layout = layout_shards([TensorEntry("a", "F32", (6,))], max_shard_bytes=GB)[0]
    asked: list[tuple[int, int]] = []

    def refuse(_descriptor: int, offset: int, nbytes: int, _flags: int) -> int:
        asked.append((offset, nbytes))
        return -1

    contents = []
    for name, call in (("refused", refuse), ("missing", None), ("real", disk._sync_file_range())):
        monkeypatch.setattr(disk, "_sync_file_range", lambda call=call: call)
        with ShardWriter(tmp_path / name, layout) as writer:
            writer.write("a", 0, torch.arange(4.0))
            writer.write("a", 4, torch.arange(2.0))
        contents.append((tmp_path / name).read_bytes())
    header = len(layout.header)
    assert asked == [(header, 16), (header + 16, 8)]
    assert contents[0] == contents[1] == contents[2]
