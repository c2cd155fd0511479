"""The cost model of `finemoe plan`: whether a budget fits, and the decoding speed to expect on this machine.

A token's time is the sum of the dense part's, the active experts' matmuls and the transfers of missing experts; overlap
of compute and transfers is ignored, so the forecast is conservative. The hit rate depends on the model's routing, which
headers do not show, so there are two forecasts: routing without locality (a hit rate equal to the share of resident
experts), and routing as local as gpt-oss-20b's, whose hit rates under `lfru` were measured on recorded traces.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

from finemoe.errors import FinemoeError
from finemoe.policy.finemoe.policy import STORE_BYTES
from finemoe.sim.config import SimulateConfig
from finemoe.sim.hardware import HARDWARE, SHAPES, Hardware, link_ratio
from finemoe.system import available_bytes

_CHUNK_BYTES = 1 << 20
_PAGE_BYTES = 4096  # direct reads are aligned to it
# hit rate of lfru by share of resident experts: gpt-oss-20b, decoding (tests/policy/test_real_traces.py)
LOCAL_HITS = ((0.0, 0.0), (0.1, 0.28), (0.25, 0.66), (0.5, 0.915), (0.75, 0.985), (1.0, 1.0))

# memory of a run beyond a process that has loaded the libraries, measured as the peak of `generate` on a tiny model:
# 15 MiB with lru (reader threads, activations), and 115 MiB more with the default policy (numba)
RUN_BYTES = 130 << 20


@dataclass(frozen=True)
class Rates:
    """Measured rates and memory of this machine."""

    disk_bytes_s: float  # random 1 MiB reads past the page cache
    memory_bytes_s: float  # weights streamed through a matmul with one row, as decoding does
    available_bytes: int  # to this process, beyond what it has
    resident_bytes: int  # of this process: interpreter, torch, transformers


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model that determine its speed."""

    layers: int  # L
    active: int  # K
    experts: int  # of the whole model
    least_slots: int  # that a load accepts
    slot_bytes: int
    expert_bytes: int  # all routed experts
    dense_bytes: int


@dataclass(frozen=True)
class Forecast:
    """What to expect of one budget."""

    share: float
    slots: int
    expert_memory_bytes: int
    process_bytes: int  # interpreter, libraries, activations, the policy and its store
    total_bytes: int  # pool, dense part and process
    fits: bool
    raised: bool  # to the least that a load accepts, as the budget is below it
    tok_s_uniform: float  # routing without locality
    tok_s_local: float  # routing as local as gpt-oss-20b's


def forecast(sizes: Sizes, rates: Rates, share: float) -> Forecast:
    """The forecast for a pool of `share` of all routed experts. Pure arithmetic."""
    slots = max(sizes.least_slots, min(sizes.experts, int(share * sizes.experts + 1e-9)))
    resident = slots / sizes.experts
    active_bytes = sizes.layers * sizes.active * sizes.expert_bytes / sizes.experts
    compute_s = (sizes.dense_bytes + active_bytes) / rates.memory_bytes_s

    def tok_s(hit_rate: float) -> float:
        return 1.0 / (compute_s + (1.0 - hit_rate) * active_bytes / rates.disk_bytes_s)

    pool_bytes = slots * sizes.slot_bytes
    process_bytes = rates.resident_bytes + RUN_BYTES + STORE_BYTES
    total_bytes = sizes.dense_bytes + pool_bytes + process_bytes
    return Forecast(
        share=resident,
        slots=slots,
        expert_memory_bytes=pool_bytes,
        process_bytes=process_bytes,
        total_bytes=total_bytes,
        fits=total_bytes - rates.resident_bytes <= rates.available_bytes,  # this process has allocated its part already
        raised=int(share * sizes.experts + 1e-9) < sizes.least_slots,
        tok_s_uniform=tok_s(resident),
        tok_s_local=tok_s(_interpolate(resident)),
    )


def _interpolate(share: float) -> float:
    for (x0, y0), (x1, y1) in pairwise(LOCAL_HITS):
        if share <= x1:
            return y0 + (y1 - y0) * (share - x0) / (x1 - x0)
    return 1.0


def measure(folder: Path | None = None, sample_bytes: int = 256 << 20) -> Rates:
    """Measures this machine, in a second or two.

    Args:
        folder: folder of the model's files, on the disk to measure; by default the folder for temporary files.
        sample_bytes: how many bytes are read and multiplied.

    Raises:
        FinemoeError: the disk has no room for the sample.
    """
    resident = int(psutil.Process().memory_info().rss)  # before the samples
    return Rates(_disk_bytes_s(folder, sample_bytes), _memory_bytes_s(sample_bytes), available_bytes(), resident)


def _memory_bytes_s(sample_bytes: int) -> float:
    import torch  # only here: simulate does without
    from torch.nn import functional as F  # noqa: N812 - the name that torch users know

    columns = 2048
    weights = torch.ones(sample_bytes // (2 * columns), columns, dtype=torch.bfloat16)
    row = torch.ones(1, columns, dtype=torch.bfloat16)
    best_s = float("inf")
    for _ in range(4):
        start_s = time.perf_counter()
        F.linear(row, weights)
        best_s = min(best_s, time.perf_counter() - start_s)
    return sample_bytes / best_s


def _disk_bytes_s(folder: Path | None, sample_bytes: int) -> float:
    with _sample_file(folder, sample_bytes) as path:
        descriptor = _open_past_cache(path)
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            size_bytes = path.stat().st_size // _PAGE_BYTES * _PAGE_BYTES
            steps = max(1, size_bytes // _CHUNK_BYTES)
            stride = next((s for s in (37, 41, 43, 47) if steps % s), 1)  # scattered, each chunk once
            with mmap.mmap(-1, _CHUNK_BYTES) as buffer:
                start_s, done = time.perf_counter(), 0
                for step in range(steps):
                    done += os.preadv(descriptor, [buffer], step * stride % steps * _CHUNK_BYTES)
                    if time.perf_counter() - start_s > 2.0:
                        break
                return done / (time.perf_counter() - start_s)
        finally:
            os.close(descriptor)


def _open_past_cache(path: Path) -> int:
    """A descriptor of `path`, for direct reads if the file system supports them."""
    with suppress(AttributeError, OSError):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            os.preadv(
                descriptor, [mmap.mmap(-1, _PAGE_BYTES)], 0
            )  # some file systems accept the flag and refuse the read
        except OSError:
            os.close(descriptor)
            raise
        return descriptor
    return os.open(path, os.O_RDONLY)


@contextmanager
def _sample_file(folder: Path | None, sample_bytes: int) -> Iterator[Path]:
    """A file on the disk to measure: the model's largest, or a temporary one."""
    if folder is not None and folder.is_dir():
        largest = max(folder.glob("*.safetensors"), key=lambda p: p.stat().st_size, default=None)
        if largest is not None and largest.stat().st_size >= 16 * _CHUNK_BYTES:
            yield largest
            return
    with tempfile.NamedTemporaryFile(prefix="finemoe-") as file:
        try:
            block = os.urandom(_CHUNK_BYTES)
            for _ in range(sample_bytes // _CHUNK_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise FinemoeError(f"{file.name}: no room to measure the disk ({error.strerror})") from error
        yield Path(file.name)


def link_ratios(config: SimulateConfig) -> tuple[float, ...]:
    """Time to transfer one expert / time of one layer's compute for one token. The preset `disk` is measured now.

    Raises:
        FinemoeError: the disk has no room for the sample.
    """
    if config.hardware is None or config.shape is None:
        return config.link_ratios
    hardware = HARDWARE.get(config.hardware) or _this_machine()
    return (link_ratio(SHAPES[config.shape], hardware),)


def _this_machine() -> Hardware:
    rates = measure()
    return Hardware(rates.memory_bytes_s, rates.disk_bytes_s, 0.0)
