"""Reader threads over a source in memory, and helpers to submit to and collect from them."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from finemoe.store.reader_threads import ReaderThreads
from finemoe.types import ExpertId, Landed
from tests.fakes import MemorySource

Slots = dict[ExpertId, bytearray]


def experts(count: int, size_bytes: int = 100) -> dict[ExpertId, bytes]:
    draw = random.Random(0)
    return {ExpertId(0, i): draw.randbytes(size_bytes) for i in range(count)}


def slots_for(source: MemorySource) -> Slots:
    return {expert: bytearray(len(data)) for expert, data in source.experts.items()}


@contextmanager
def reading(source: MemorySource, threads: int = 2, chunk_bytes: int = 16) -> Iterator[ReaderThreads]:
    transfer = ReaderThreads(source, threads, chunk_bytes)
    try:
        yield transfer
    finally:
        transfer.close()


def submit(transfer: ReaderThreads, slots: Slots, *, urgent: bool = True) -> None:
    for expert, slot in slots.items():
        transfer.submit(expert, memoryview(slot), urgent=urgent)


def collect(transfer: ReaderThreads, count: int) -> dict[ExpertId, Landed]:
    landed: list[Landed] = []
    while len(landed) < count:
        landed += transfer.wait()
    assert len(landed) == count
    return {item.expert: item for item in landed}


class Gate:
    """Blocks readers until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.open = threading.Event()

    def __call__(self, *_: object) -> None:
        self.entered.set()
        assert self.open.wait(30)
