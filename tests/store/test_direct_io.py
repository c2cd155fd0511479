"""Disk reads: the right bytes with direct and buffered I/O, no copy in the page cache, errors that name the file."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from finemoe.checkpoint import ExpertIndex, TensorHeader
from finemoe.checkpoint.expert_index import PAGE_BYTES
from finemoe.store import DiskStore
from finemoe.store.dense import LazyTensor
from finemoe.store.direct_io import CHUNK_BYTES
from finemoe.types import ByteRange

EMPTY = ExpertIndex([], {})
SIZE_BYTES = 2 * CHUNK_BYTES + 3 * PAGE_BYTES + 123
Io = Literal["auto", "direct", "buffered"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("disk") / "data.safetensors"
    path.write_bytes(random.Random(0).randbytes(SIZE_BYTES))
    with path.open("rb") as synced:
        os.fsync(synced.fileno())
    return path


@pytest.fixture(scope="module", params=["direct", "buffered"])
def store(request: pytest.FixtureRequest, file: Path) -> Iterator[DiskStore]:
    under_test = open_store(file, request.param)
    yield under_test
    under_test.close()


def open_store(file: Path, io: Io) -> DiskStore:
    try:
        return DiskStore([file], EMPTY, io)
    except OSError as error:
        if io == "direct" and error.errno == errno.EINVAL:
            pytest.skip("the file system of the temporary folder has no direct I/O")
        raise


def read(store: DiskStore, offset: int, length: int, start: int = 0) -> bytes:
    into = bytearray(length)
    store.read(ByteRange(0, offset, length + start, 0), start, memoryview(into))
    return bytes(into)


@given(st.integers(0, SIZE_BYTES - 1), st.integers(1, CHUNK_BYTES), st.integers(0, PAGE_BYTES))
@example(0, 1, 0)
@example(SIZE_BYTES - 1, 1, 0)
@example(PAGE_BYTES - 1, 2, 0)
@example(PAGE_BYTES - 1, CHUNK_BYTES, 0)
@example(SIZE_BYTES - CHUNK_BYTES, CHUNK_BYTES, 0)
def test_any_byte_range_is_read(store: DiskStore, file: Path, offset: int, length: int, start: int) -> None:
    length = min(length, SIZE_BYTES - offset)
    start = min(start, offset)
    expected = file.read_bytes()[offset : offset + length]
    assert read(store, offset - start, length, start) == expected


@given(st.integers(0, SIZE_BYTES - 1), st.integers(1, CHUNK_BYTES))
@example(0, CHUNK_BYTES)
@example(PAGE_BYTES - 1, PAGE_BYTES + 2)
@example(PAGE_BYTES - 1, CHUNK_BYTES)
@example(SIZE_BYTES - 3 * PAGE_BYTES, 3 * PAGE_BYTES)
def test_a_range_at_its_files_offset_within_a_page_is_read_and_nothing_around_it(
    store: DiskStore, file: Path, offset: int, length: int
) -> None:
    length = min(length, SIZE_BYTES - offset)
    memory = bytearray(mmap.mmap(-1, CHUNK_BYTES + 4 * PAGE_BYTES))
    shift = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % PAGE_BYTES
    begin = shift + PAGE_BYTES + offset % PAGE_BYTES
    memory[:] = b"?" * len(memory)
    store.read(ByteRange(0, offset, length, 0), 0, memoryview(memory)[begin : begin + length])
    assert memory[begin : begin + length] == file.read_bytes()[offset : offset + length]
    assert not memory[:begin].strip(b"?")
    assert not memory[begin + length :].strip(b"?")


def test_complete_pages_at_their_files_offset_are_not_copied(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(file, "direct")
    copied: list[int] = []
    monkeypatch.setattr(store, "_read_and_copy", lambda *_: copied.append(1))
    memory = mmap.mmap(-1, 20 * PAGE_BYTES)
    with memoryview(memory) as view:
        store.read(ByteRange(0, 77, 10 * PAGE_BYTES, 0), 0, view[77 : 77 + 10 * PAGE_BYTES])
        assert bytes(view[77 : 77 + 10 * PAGE_BYTES]) == file.read_bytes()[77 : 77 + 10 * PAGE_BYTES]
        assert not copied
        store.read(ByteRange(0, 77, 10 * PAGE_BYTES, 0), 0, view[78 : 78 + 10 * PAGE_BYTES])
        assert copied
    store.close()


@pytest.mark.parametrize("offset", [SIZE_BYTES - 10, SIZE_BYTES - PAGE_BYTES, SIZE_BYTES, SIZE_BYTES + 5 * PAGE_BYTES])
def test_a_read_past_the_end_is_an_error_that_names_the_file(store: DiskStore, file: Path, offset: int) -> None:
    with pytest.raises(OSError, match="file ends before byte") as caught:
        read(store, offset, 2 * PAGE_BYTES)
    assert caught.value.filename == str(file)


@pytest.mark.parametrize("io", ["direct", "buffered"])
@pytest.mark.parametrize("left_bytes", [0, 100, PAGE_BYTES, PAGE_BYTES + 1])
def test_a_file_cut_off_after_opening_is_an_error_that_names_it(tmp_path: Path, io: Io, left_bytes: int) -> None:
    path = tmp_path / "shrinking.safetensors"
    path.write_bytes(b"x" * 8 * PAGE_BYTES)
    store = open_store(path, io)
    os.truncate(path, left_bytes)
    with pytest.raises(OSError, match=r"was it changed\?.*shrinking\.safetensors"):
        read(store, 10, 6 * PAGE_BYTES)
    store.close()


def test_an_error_of_the_disk_names_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    for io in ("direct", "buffered"):
        store = open_store(file, io)
        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", broken)
            with pytest.raises(OSError, match="Input/output error") as caught:
                read(store, 0, 10)
        assert caught.value.filename == str(file)
        store.close()


def test_reads_that_the_kernel_cuts_short_are_continued(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def short(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        return real(descriptor, [buffers[0][:PAGE_BYTES]], offset)

    for io in ("direct", "buffered"):
        store = open_store(file, io)
        memory = mmap.mmap(-1, 8 * PAGE_BYTES)
        with monkeypatch.context() as patch, memoryview(memory) as view:
            patch.setattr(os, "preadv", short)
            expected = file.read_bytes()[77 : 77 + 5 * PAGE_BYTES]
            assert read(store, 77, 5 * PAGE_BYTES) == expected
            store.read(ByteRange(0, 77, 5 * PAGE_BYTES, 0), 0, view[77 : 77 + 5 * PAGE_BYTES])
            assert view[77 : 77 + 5 * PAGE_BYTES] == expected
        store.close()


def test_threads_can_read_at_the_same_time(store: DiskStore, file: Path) -> None:
    data = file.read_bytes()
    draw = random.Random(1)
    ranges = [(draw.randrange(SIZE_BYTES - 50_000), draw.randint(1, 50_000)) for _ in range(200)]
    with ThreadPoolExecutor(8) as pool:
        for (offset, length), got in zip(ranges, pool.map(lambda s: read(store, *s), ranges), strict=True):
            assert got == data[offset : offset + length]


def cached_pages(path: Path) -> int:
    """How many of a file's pages the kernel holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "mincore"):
        pytest.skip("this platform can't be asked what its page cache holds")
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        anchor = ctypes.c_char.from_buffer(mapped)
        pages = (ctypes.c_ubyte * -(-size // PAGE_BYTES))()
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(anchor)), ctypes.c_size_t(size), pages)
        del anchor
    if failed:
        pytest.skip(f"mincore is refused here: {os.strerror(ctypes.get_errno())}")
    return sum(page & 1 for page in pages)


@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_reading_experts_leaves_no_copy_in_the_page_cache(tmp_path: Path, io: Io) -> None:
    path = tmp_path / "cold.safetensors"
    path.write_bytes(b"x" * 4 * CHUNK_BYTES)
    store = open_store(path, io)
    with path.open("rb") as cooled:
        os.fsync(cooled.fileno())
        os.posix_fadvise(cooled.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before = cached_pages(path)
    if before > 100:
        pytest.skip("this file system does not drop pages when asked to")
    for start in range(0, 4 * CHUNK_BYTES, CHUNK_BYTES):
        read(store, start, CHUNK_BYTES)
    store.close()
    # read-ahead beyond the last read may stay for a while; a second copy would be 1024 pages
    assert cached_pages(path) <= before + (0 if io == "direct" else 300)


def refuse_direct(monkeypatch: pytest.MonkeyPatch, at: Literal["open", "read"]) -> None:
    real_open, real_read, direct = os.open, os.preadv, set[int]()

    def refusing_open(path: str, flags: int) -> int:
        if flags & os.O_DIRECT and at == "open":
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        descriptor = real_open(path, flags & ~os.O_DIRECT)
        (direct.add if flags & os.O_DIRECT else direct.discard)(descriptor)
        return descriptor

    def refusing_read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if descriptor in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_read(descriptor, buffers, offset)

    monkeypatch.setattr(os, "open", refusing_open)
    monkeypatch.setattr(os, "preadv", refusing_read)


@pytest.mark.parametrize("at", ["open", "read"])
def test_auto_falls_back_where_direct_reads_are_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch, at: Literal["open", "read"]
) -> None:
    refuse_direct(monkeypatch, at)
    store = DiskStore([file], EMPTY, "auto")
    assert store.io == "buffered"
    assert read(store, 99, 1000) == file.read_bytes()[99:1099]
    store.close()
    with pytest.raises(OSError, match="Invalid argument"):
        DiskStore([file], EMPTY, "direct")


def test_a_platform_without_direct_or_positioned_reads_works(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("O_DIRECT", "preadv"):
        monkeypatch.delattr(os, name)
    store = DiskStore([file], EMPTY, "auto")
    with ThreadPoolExecutor(4) as pool:
        for offset, got in zip(range(50), pool.map(lambda o: read(store, o, 9999), range(50)), strict=True):
            assert got == file.read_bytes()[offset : offset + 9999]
    store.close()


def test_a_platform_that_cannot_drop_pages_warns(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise")
    with pytest.warns(UserWarning, match="can't be asked to drop read pages"):
        store = DiskStore([file], EMPTY, "buffered")
    assert read(store, 5, 5) == file.read_bytes()[5:10]
    store.close()


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files under /proc")
@pytest.mark.parametrize("io", ["auto", "direct", "buffered"])
def test_files_that_cannot_be_opened_are_named_and_the_others_closed(file: Path, io: Io) -> None:
    before = open_files()
    missing = file.with_name("missing.safetensors")
    with pytest.raises(FileNotFoundError) as caught:
        DiskStore([file, missing], EMPTY, io)
    assert str(caught.value.filename) == str(missing)
    assert open_files() == before


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts open files under /proc")
def test_close_closes_the_files(file: Path) -> None:
    before = open_files()
    store = DiskStore([file, file], EMPTY)
    assert open_files() == before + 2
    store.close()
    store.close()
    assert open_files() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4, 5), (600, 1000)])
def test_dense_tensors_are_read(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.bool: "BOOL", torch.uint8: "U8"}
    expected = torch.randint(0, 2, shape).to(dtype)
    raw = expected.reshape(-1).view(torch.uint8).numpy().tobytes() if expected.numel() else b""
    path = tmp_path / "dense.safetensors"
    path.write_bytes(b"12345" + raw)
    store = DiskStore([path], EMPTY)
    tensor = LazyTensor(store, "x", TensorHeader(0, 5, len(raw), names[dtype], shape))
    assert torch.equal(tensor[...], expected)
    assert tensor.get_shape() == list(shape)
    assert tensor.get_dtype() == names[dtype]
    with pytest.raises(TypeError, match="only whole tensors"):
        tensor[0]  # type: ignore[index]
    store.close()


def test_a_dense_tensor_in_an_unknown_dtype_is_named(file: Path) -> None:
    store = DiskStore([file], EMPTY)
    with pytest.raises(TypeError, match="x: can't read a tensor stored as F4"):
        LazyTensor(store, "x", TensorHeader(0, 0, 4, "F4", (8,)))[...]
    store.close()
