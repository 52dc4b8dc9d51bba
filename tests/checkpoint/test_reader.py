from __future__ import annotations

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mergekit_bayes.checkpoint.dtypes import DTYPES, torch_dtype
from mergekit_bayes.checkpoint.header import TensorInfo, read_header
from mergekit_bayes.checkpoint.reader import BlockReader
from mergekit_bayes.errors import CheckpointError
from tests.checkpoint.raw_files import field, raw_bytes


def saved(folder: Path, **tensors: torch.Tensor):
    """Headers of tensors saved by safetensors."""
    path = folder / "x.safetensors"
    save_file(tensors, path)
    return read_header(path).tensors


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_type(tmp_path, name):
    # every bit pattern that means something: bytes 0 and 1 are the only ones a bool has
    dtype, generator = torch_dtype(name), torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 2 if name == "BOOL" else 256, (12, 5 * DTYPES[name].itemsize), generator=generator)
    tensor = patterns.to(torch.uint8).view(dtype)
    info = saved(tmp_path, x=tensor)["x"]
    with BlockReader() as reader:
        whole, block = reader.read_tensor(info), reader.read_block(info, 7, 20)
    assert (whole.dtype, whole.shape, block.dtype, block.shape) == (dtype, (12, 5), dtype, (20,))
    assert torch.equal(whole.view(torch.uint8), patterns.to(torch.uint8))
    assert torch.equal(block.view(torch.uint8), tensor.view(-1)[7:27].view(torch.uint8))


@given(st.data())
def test_any_block_of_any_tensor(tmp_path_factory, data):
    shape = data.draw(st.lists(st.integers(0, 6), max_size=3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]))
    tensor = torch.arange(torch.Size(shape).numel()).to(dtype).reshape(shape)
    start = data.draw(st.integers(0, tensor.numel()))
    count = data.draw(st.integers(0, tensor.numel() - start))
    infos = saved(tmp_path_factory.getbasetemp(), before=torch.ones(3), x=tensor, y=torch.ones(3, dtype=torch.uint8))
    with BlockReader() as reader:
        assert torch.equal(reader.read_tensor(infos["x"]), tensor)
        assert torch.equal(reader.read_block(infos["x"], start, count), tensor.reshape(-1)[start : start + count])


@pytest.mark.parametrize("shift", range(9))
def test_tensors_at_odd_places_of_the_file(tmp_path, shift):
    values = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    header = {"pad": field("U8", [shift], 0, shift), "x": field("F64", [100], shift, shift + 800)}
    path = tmp_path / "odd.safetensors"
    path.write_bytes(raw_bytes(header, bytes(shift) + values.numpy().tobytes()))
    with BlockReader() as reader:
        assert torch.equal(reader.read_tensor(read_header(path).tensors["x"]), values)
        assert torch.equal(reader.read_block(read_header(path).tensors["x"], 33, 11), values[33:44])


def test_a_buffer_is_filled_and_reused(tmp_path):
    info = saved(tmp_path, x=torch.arange(10, dtype=torch.float32))["x"]
    out = torch.full((3, 2), -1.0)
    with BlockReader() as reader:
        first = reader.read_block(info, 0, 4, out)
        assert first.data_ptr() == out.data_ptr()
        assert first.tolist() == [0, 1, 2, 3]
        assert out.view(-1).tolist() == [0, 1, 2, 3, -1, -1]
        assert reader.read_block(info, 4, 6, out).tolist() == [4, 5, 6, 7, 8, 9]
        assert reader.read_block(info, 10, 0, out).shape == (0,)


@pytest.mark.parametrize(
    "out",
    [
        torch.zeros(3),
        torch.zeros(4, dtype=torch.float64),
        torch.zeros(8)[::2],
        torch.zeros(4, device="meta"),
    ],
)
def test_a_buffer_that_does_not_fit_is_refused(tmp_path, out):
    info = saved(tmp_path, x=torch.ones(10))["x"]
    with BlockReader() as reader, pytest.raises(ValueError, match="out must be a contiguous CPU tensor of 4 elements"):
        reader.read_block(info, 0, 4, out)


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 11), (10, 1), (5, -1), (11, 0)])
def test_a_block_outside_the_tensor_is_refused(tmp_path, start, count):
    info = saved(tmp_path, x=torch.ones(10))["x"]
    with BlockReader() as reader, pytest.raises(ValueError, match="elements"):
        reader.read_block(info, start, count)


def test_short_reads_are_continued(tmp_path, monkeypatch):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    info = saved(tmp_path, x=values)["x"]
    real = os.preadv
    # what a signal or a network file system may do: any number of bytes, not a whole element
    monkeypatch.setattr("os.preadv", lambda fd, views, at: real(fd, [views[0][:7]], at))
    with BlockReader() as reader:
        assert torch.equal(reader.read_tensor(info), values)


def test_a_file_that_shrinks_is_an_error_and_not_the_end_of_the_process(tmp_path):
    info = saved(tmp_path, x=torch.ones(100_000))["x"]
    with BlockReader() as reader:
        reader.read_block(info, 0, 10)
        os.truncate(info.path, info.offset + 4000)
        assert reader.read_block(info, 0, 1000).sum() == 1000
        with pytest.raises(
            CheckpointError, match=r"x\.safetensors: changed while reading: tensor x: the file ends at byte"
        ):
            reader.read_tensor(info)


def test_a_file_that_is_gone_is_an_error(tmp_path):
    info = saved(tmp_path, x=torch.ones(10))["x"]
    info.path.unlink()
    with BlockReader() as reader, pytest.raises(CheckpointError, match=r"x\.safetensors: cannot be opened"):
        reader.read_tensor(info)


def test_a_failing_disk_is_an_error_that_names_the_tensor(tmp_path, monkeypatch):
    info = saved(tmp_path, x=torch.ones(10))["x"]

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.preadv", fail)
    with BlockReader() as reader, pytest.raises(CheckpointError, match="tensor x: cannot be read: Input/output error"):
        reader.read_tensor(info)


def many(folder: Path, count: int) -> list[TensorInfo]:
    infos = []
    for number in range(count):
        save_file({"x": torch.full((1000,), float(number))}, folder / f"{number}.safetensors")
        infos.append(read_header(folder / f"{number}.safetensors").tensors["x"])
    return infos


def test_few_files_are_open_at_once_and_none_after(tmp_path):
    infos = many(tmp_path, 20)
    before = open_descriptors()
    with BlockReader(max_open=4) as reader:
        for _ in range(2):
            for number, info in enumerate(infos):
                assert reader.read_tensor(info).unique().tolist() == [number]
                assert open_descriptors() <= before + 4
    assert open_descriptors() == before


def test_a_file_replaced_between_two_openings_is_refused(tmp_path):
    infos = many(tmp_path, 3)
    with BlockReader(max_open=1) as reader:
        for info in infos:
            reader.read_tensor(info)
        save_file({"x": torch.zeros(1000)}, infos[0].path)
        with pytest.raises(CheckpointError, match=r"0\.safetensors: changed while reading: it was replaced"):
            reader.read_tensor(infos[0])
        assert reader.read_tensor(infos[1]).unique().tolist() == [1]


def test_a_closed_reader_reads_no_more(tmp_path):
    info = saved(tmp_path, x=torch.ones(10))["x"]
    reader = BlockReader()
    reader.read_tensor(info)
    reader.close()
    reader.close()
    with pytest.raises(ValueError, match="closed"):
        reader.read_tensor(info)


def test_many_threads_share_one_reader(tmp_path):
    infos = many(tmp_path, 12)
    before = open_descriptors()
    barrier = threading.Barrier(8)

    def read(worker: int) -> int:
        barrier.wait()
        generator = torch.Generator().manual_seed(worker)
        out = torch.empty(1000)
        wrong = 0
        for _ in range(300):
            number = int(torch.randint(len(infos), (), generator=generator))
            start = int(torch.randint(1000, (), generator=generator))
            block = reader.read_block(infos[number], start, 1000 - start, out)
            wrong += int((block != number).sum())
        return wrong

    with BlockReader(max_open=3) as reader, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(8))) == [0] * 8
        assert open_descriptors() <= before + 8 + 3
    assert open_descriptors() == before


def test_a_big_endian_machine_is_refused(monkeypatch):
    monkeypatch.setattr("sys.byteorder", "big")
    with pytest.raises(CheckpointError, match="big-endian"):
        BlockReader()


@pytest.mark.slow
def test_reading_is_about_as_fast_as_memory(tmp_path):
    # 256 MB from the page cache; memcpy of the same blocks is the yardstick, since machines differ
    path, size, block = tmp_path / "big", 1 << 28, 1 << 22
    path.write_bytes(bytes(size))
    info = TensorInfo("x", "BF16", (size // 2,), path, 0, size)
    out, other = torch.empty(block, dtype=torch.bfloat16), torch.ones(block, dtype=torch.bfloat16)

    def best(action) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            for first in range(0, size // 2, block):
                action(first)
            times.append(time.perf_counter() - start)
        return min(times)

    with BlockReader() as reader:
        reading = best(lambda first: reader.read_block(info, first, block, out))
    copying = best(lambda _: out.copy_(other))
    assert reading < 8 * copying


def test_what_safetensors_reads_is_read_from_a_real_checkpoint(tiny_checkpoint):
    path = tiny_checkpoint("gpt2", dtype="bfloat16") / "model.safetensors"
    with BlockReader() as reader:
        for name, tensor in load_file(path).items():
            assert torch.equal(reader.read_tensor(read_header(path).tensors[name]), tensor)
