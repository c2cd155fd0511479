"""Loads a GGUF model: reads the dense part, leaves experts on disk, and checks the graph's structure.

Order: read headers; let the library load the model into anonymous memory; run three passes with zeroed experts to find
the experts of each layer; create slots, readers, policy and engine as for any other model.
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
_TRIAL_TOKENS = 32  # context length of the passes that find the structure
IO = Literal["auto", "direct", "buffered"]


@dataclass(frozen=True)
class GgufOptions:
    """How a GGUF model is loaded and run."""

    expert_memory: str = "25%"
    io: IO = "auto"
    reader_threads: int = 4
    threads: int = 0  # compute threads; 0: number of idle cores
    cache_type: str = "f16"  # of the KV cache
    bandwidth_bytes_s: float | None = None  # limit for expert reads, for experiments


MakeEngine = Callable[[ExpertMemory, ReaderThreads, ExpertIndex], Engine]


@dataclass
class Loaded:
    """The parts of a loaded model."""

    file: GgufFile
    library: Library
    model: int  # handle of the library's model
    structure: Structure
    expert_index: ExpertIndex
    memory: ExpertMemory
    store: DiskStore
    transfer: ReaderThreads
    engine: Engine
    runner: Runner
    starts: Mapping[int, int]  # by file, the address of its first byte
    dense_bytes_read: int
    resources: ExitStack  # frees everything, in the right order


def load_parts(file: GgufFile, options: GgufOptions, make_engine: MakeEngine) -> Loaded:
    """Load a model.

    Args:
        file: the model's headers.
        options: settings.
        make_engine: creates the engine with its policy and cache, once the model's shape is known.

    Raises:
        CheckpointError: a file can't be read, or the library rejects it.
        UnsupportedModelError: the model is dense, or its experts can't be offloaded exactly.
        BudgetError: the expert memory is less than one token needs, or more than the machine has.
        ConfigError: the library is missing, or the system lacks a required feature.
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
            "are available; use a smaller file"
        )
    dense = _DensePart(file, options.io)
    mappings = FileMappings(file.files, dense.read)
    try:
        model = _load_model(library, file, mappings)
    finally:
        dense.close()
    resources.callback(library.api.llama_model_free, model)
    file.refuse_changed()  # headers, dense part and experts must come from the same file
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
    """Pass gates and embeddings to the policy, and predicted gates for `lookahead` layers ahead (0: none)."""
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
    """The model's token embeddings; `None` if it has no tensor of the standard name."""
    info = parts.file.tensors.get("token_embd.weight")
    return None if info is None else EmbeddingTable(info, parts.starts[info.file] + info.offset_bytes)


def _load_model(library: Library, file: GgufFile, mappings: FileMappings) -> int:
    params = library.api.llama_model_default_params()
    params.n_gpu_layers, params.load_mode = 0, LOAD_MMAP
    params.use_extra_bufts = False  # otherwise the library copies repacked weights out of the mapping
    library.last_error()
    with mappings.in_place(library.path):
        model: int | None = library.api.llama_model_load_from_file(os.fsencode(file.files[0]), params)
    if not model:
        raise CheckpointError(f"{file.name}: llama.cpp can't load it: {library.last_error() or 'no reason given'}")
    if lacking := [str(path) for number, path in enumerate(file.files) if number not in mappings.starts]:
        library.api.llama_model_free(model)
        raise UnsupportedModelError(f"{lacking[0]}: llama.cpp did not map this file; run the model with llama.cpp")
    if library.api.llama_model_has_encoder(model) or library.api.llama_model_is_diffusion(model):
        library.api.llama_model_free(model)
        raise UnsupportedModelError(f"{file.name}: is not an autoregressive decoder; run it with llama.cpp")
    return model


def _slots(expert_index: ExpertIndex, structure: Structure, expert_memory: str) -> int:
    """Number of expert slots within the budget, `C`.

    Raises:
        BudgetError: less than one token needs in one layer; the message gives the minimum.
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
    """Make expert tensors that no graph node uses inaccessible: they hold zeros, and using one must crash."""
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
    """Reads the dense part, including pages shared by two experts, on several threads."""

    def __init__(self, file: GgufFile, io: IO) -> None:
        self._file = file
        self._store = _open(file, index_experts(()), io)
        self._threads = ThreadPoolExecutor(_DENSE_READERS)
        self.bytes_read = 0

    def read(self, file: int, address: int, start: int, end: int) -> None:
        """Read the dense bytes in `[start, end)` of a file into memory; `address` corresponds to file offset 0."""
        offsets = [info.offset_bytes for info in self._file.tensors.values() if info.file == file]
        start = max(start, min(offsets, default=end) // PAGE_BYTES * PAGE_BYTES)  # skips the header
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
