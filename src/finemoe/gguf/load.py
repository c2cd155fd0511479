"""Loads a GGUF model: the dense part is read, experts stay on disk, and the graph's structure is tried.

In this order: headers; the library loads the model into memory of ours; three passes over zeros find which experts each
layer uses; then slots, readers, policy and engine are set up as for any other model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np

from finemoe.budget import format_bytes, parse_budget
from finemoe.checkpoint import ExpertIndex
from finemoe.engine.engine import Engine
from finemoe.errors import BudgetError, CheckpointError, UnsupportedModelError
from finemoe.gguf.address_space import NO_ACCESS, PAGE_BYTES, map_anonymous, view
from finemoe.gguf.binding import LOAD_MMAP, Library, load_library
from finemoe.gguf.context import Context, ContextOptions
from finemoe.gguf.embedding import EmbeddingTable
from finemoe.gguf.expert_layout import dense_ranges, index_experts
from finemoe.gguf.expert_memory import ExpertMemory
from finemoe.gguf.file import GgufFile
from finemoe.gguf.gate_reader import GateReader
from finemoe.gguf.mapping import FileMappings
from finemoe.gguf.runner import Runner, micro_batch_for
from finemoe.gguf.structure import Eval, Structure, find_structure
from finemoe.store.direct_io import CHUNK_BYTES, DiskStore
from finemoe.store.reader_threads import ReaderThreads
from finemoe.system import available_bytes, idle_cores
from finemoe.types import ByteRange

_DENSE_READERS = 4
_TRIAL_TOKENS = 32  # of the context in which the structure is found
IO = Literal["auto", "direct", "buffered"]


@dataclass(frozen=True)
class GgufOptions:
    """How a GGUF model is loaded and run."""

    expert_memory: str = "25%"
    io: IO = "auto"
    reader_threads: int = 4
    threads: int = 0  # that compute; 0: as many as there are idle cores
    cache_type: str = "f16"  # of keys and values
    bandwidth_bytes_s: float | None = None  # that experts are held to, for experiments


MakeEngine = Callable[[ExpertMemory, ReaderThreads, ExpertIndex], Engine]


@dataclass
class Loaded:
    """The parts of a loaded model."""

    file: GgufFile
    library: Library
    model: int  # the library's
    structure: Structure
    expert_index: ExpertIndex
    memory: ExpertMemory
    store: DiskStore
    transfer: ReaderThreads
    engine: Engine
    runner: Runner
    starts: Mapping[int, int]  # the address of each file's first byte
    dense_bytes_read: int
    resources: ExitStack  # frees everything, in the right order


def load_parts(file: GgufFile, options: GgufOptions, make_engine: MakeEngine) -> Loaded:
    """Load a model.

    Args:
        file: its headers.
        options: how.
        make_engine: puts policy, cache and engine together, once the model's shape is known.

    Raises:
        CheckpointError: a file can't be read, or the library refuses it.
        UnsupportedModelError: a dense model, or one whose experts can't be offloaded exactly.
        BudgetError: the expert memory is below what a token needs, or above what the machine has.
        ConfigError: the library is missing, or the system lacks something.
    """
    file.refuse_dense()
    with ExitStack() as resources:
        loaded = _load(file, load_library(), options, make_engine, resources)
        loaded.resources = resources.pop_all()
        return loaded


def _load(
    file: GgufFile, library: Library, options: GgufOptions, make_engine: MakeEngine, resources: ExitStack
) -> Loaded:
    if (needed := file.dense_bytes) > (available := available_bytes()):
        raise BudgetError(
            f"{file.name}: its dense part takes {format_bytes(needed)}, but only {format_bytes(available)} of memory "
            "are available; take a smaller file"
        )
    dense = _DensePart(file, options.io)
    mappings = FileMappings(file.files, dense.read)
    try:
        model = _load_model(library, file, mappings)
    finally:
        dense.close()
    resources.callback(library.api.llama_model_free, model)
    file.refuse_changed()  # header, dense part and experts are of the same file
    threads = options.threads or idle_cores()

    def run_pass(evaluate: Eval) -> int:
        context = Context(library, model, _TRIAL_TOKENS, ContextOptions(micro_batch=1, threads=1), evaluate)
        try:
            return context.run([0], 0, logits=True)
        finally:
            context.close()

    structure = find_structure(library, file, mappings.starts, run_pass)
    expert_index = index_experts([layer.tensors for layer in structure.layers])
    slots = _slots(expert_index, structure, options.expert_memory)
    memory = ExpertMemory(slots, expert_index, mappings.starts)
    resources.callback(memory.close)
    memory.guard()
    _guard_unused(structure, mappings)
    store = _open(file, expert_index, options.io)
    resources.callback(store.close)
    transfer = ReaderThreads(store, options.reader_threads, bandwidth_bytes_s=options.bandwidth_bytes_s)
    resources.callback(transfer.close)
    sizes = tuple(layout.experts for layout in expert_index.layouts)
    engine = make_engine(memory, transfer, expert_index)
    micro_batch = micro_batch_for(slots, max(sizes), structure.active_experts)
    compute = ContextOptions(micro_batch, threads, options.cache_type)
    runner = Runner(library, model, structure, engine, compute)
    resources.callback(runner.close)
    memory.await_memory()
    return Loaded(
        file,
        library,
        model,
        structure,
        expert_index,
        memory,
        store,
        transfer,
        engine,
        runner,
        mappings.starts,
        dense.bytes_read,
        resources,
    )


def observe(parts: Loaded, lookahead: int) -> None:
    """Have policies see gates and embeddings from now on, and gates for so many layers ahead; 0: none of these."""
    weights = {}
    for layer in parts.structure.layers:
        info = parts.file.tensors.get(layer.probe.weight)
        if info is not None and info.type == "F32" and lookahead:
            stored = np.frombuffer(view(parts.starts[info.file] + info.offset_bytes, info.size_bytes), np.float32)
            weights[info.name] = stored.reshape(info.shape[1], info.shape[0])
    experts = max(layout.experts for layout in parts.expert_index.layouts)
    parts.runner.gates = GateReader([layer.probe for layer in parts.structure.layers], weights, experts, lookahead)
    if (table := embedding_table(parts)) is not None:
        parts.runner.embed = table.mean


def embedding_table(parts: Loaded) -> EmbeddingTable | None:
    """The model's embeddings; `None` where it has no table of the usual name."""
    info = parts.file.tensors.get("token_embd.weight")
    return None if info is None else EmbeddingTable(info, parts.starts[info.file] + info.offset_bytes)


def _load_model(library: Library, file: GgufFile, mappings: FileMappings) -> int:
    params = library.api.llama_model_default_params()
    params.n_gpu_layers, params.load_mode = 0, LOAD_MMAP
    params.use_extra_bufts = False  # else weights are repacked, out of the mapping
    library.last_error()
    with mappings.in_place(library.path):
        model: int | None = library.api.llama_model_load_from_file(os.fsencode(file.files[0]), params)
    if not model:
        raise CheckpointError(f"{file.name}: llama.cpp can't load it: {library.last_error() or 'no reason given'}")
    if lacking := [str(path) for number, path in enumerate(file.files) if number not in mappings.starts]:
        library.api.llama_model_free(model)
        raise UnsupportedModelError(f"{lacking[0]}: llama.cpp has not mapped it; run it with llama.cpp")
    if library.api.llama_model_has_encoder(model) or library.api.llama_model_is_diffusion(model):
        library.api.llama_model_free(model)
        raise UnsupportedModelError(f"{file.name}: does not write token by token; run it with llama.cpp")
    return model


def _slots(expert_index: ExpertIndex, structure: Structure, expert_memory: str) -> int:
    """`C`: how many experts the budget pays for.

    Raises:
        BudgetError: fewer than one token needs in one layer; the message names the minimum.
    """
    slot_bytes = expert_index.slot_bytes
    slots = parse_budget(expert_memory).slots(slot_bytes, expert_index.experts)
    least = structure.active_experts
    if slots < least:
        raise BudgetError(
            f"--expert-memory: {expert_memory} holds {slots} of {expert_index.experts} experts; at least {least} are "
            f"needed for one token: {least * slot_bytes} bytes ({format_bytes(least * slot_bytes)})"
        )
    return slots


def _guard_unused(structure: Structure, mappings: FileMappings) -> None:
    """Expert tensors that no graph uses are zeros: to use them ends the process, too."""
    for tensor in structure.unused:
        info = tensor.info
        first = -(-info.offset_bytes // PAGE_BYTES) * PAGE_BYTES
        end = (info.offset_bytes + info.size_bytes) // PAGE_BYTES * PAGE_BYTES
        if first < end and mappings.is_mapped(info.file, first, end):
            map_anonymous(end - first, mappings.starts[info.file] + first, NO_ACCESS)


def _open(file: GgufFile, expert_index: ExpertIndex, io: IO) -> DiskStore:
    try:
        return DiskStore(file.files, expert_index, io)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: can't be opened for --io {io} ({error.strerror})") from error


class _DensePart:
    """Reads what belongs to no expert alone, on several threads."""

    def __init__(self, file: GgufFile, io: IO) -> None:
        self._file = file
        self._store = _open(file, index_experts(()), io)
        self._threads = ThreadPoolExecutor(_DENSE_READERS)
        self.bytes_read = 0

    def read(self, file: int, address: int, start: int, end: int) -> None:
        """Read the dense bytes from `start` to `end` of a file, whose byte 0 would be at `address`."""
        own = [info.offset_bytes for info in self._file.tensors.values() if info.file == file]
        start = max(start, min(own, default=end) // PAGE_BYTES * PAGE_BYTES)  # the library has read the header
        pieces = [
            (first, min(CHUNK_BYTES, last - first))
            for begin, last in dense_ranges(self._file.expert_tensors, file, start, end)
            for first in range(begin, last, CHUNK_BYTES)
        ]

        def read(piece: tuple[int, int]) -> None:
            offset, length = piece
            self._store.read(ByteRange(file, offset, length, 0), 0, view(address + offset, length))

        try:
            for _ in self._threads.map(read, pieces):
                pass
        except OSError as error:
            raise CheckpointError(f"{error.filename}: can't be read ({error.strerror}); fetch it again") from error
        self.bytes_read += sum(length for _, length in pieces)

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        self._store.close()
