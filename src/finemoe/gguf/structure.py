"""Finds the MoE layers in the compute graph: the routing nodes and the expert tensors that use their indices.

The graph is run for one token while all experts are zero pages that take no memory. Every `MUL_MAT_ID` node refers to
its weights and to the node that holds the expert indices; layers are not inferred from tensor names. Two more
passes check what the runner relies on: each routing node's callback receives the indices, and a callback that returns
False aborts the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from ctypes import c_int32, sizeof
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from finemoe.errors import UnsupportedModelError
from finemoe.gguf.address_space import view
from finemoe.gguf.binding import Library, Tensor
from finemoe.gguf.file import ExpertTensor, GgufFile
from finemoe.gguf.gate_reader import Graph, Probe, node_at

Eval = Callable[[int, bool], bool]  # node address, ask -> whether to call back with the result
RunPass = Callable[[Eval], int]  # runs one token with this callback; returns the library's status
_I32 = 26
_SOURCES = 10


class MoELayer(NamedTuple):
    """A routing node and the expert tensors that use its indices. `active`: experts per token, `K`.

    Several routing nodes may have the same name; they run in layer order.
    """

    routing: bytes
    tensors: tuple[ExpertTensor, ...]
    active: int
    probe: Probe


@dataclass(frozen=True)
class Structure:
    """The MoE layers of a model, in execution order."""

    layers: tuple[MoELayer, ...]
    unused: tuple[ExpertTensor, ...]  # in the file, but not in the graph

    @property
    def active_experts(self) -> int:
        """The largest K of any layer."""
        return max(layer.active for layer in self.layers)


def name_of(address: int) -> bytes:
    """A node's name."""
    name: bytes = node_at(address).name
    return name


def read_indices(tensor: Tensor) -> npt.NDArray[np.int32]:
    """The experts chosen by a routing node, `[T, K]`; a view."""
    active, tokens = tensor.ne[0], tensor.ne[1]
    if not tokens:
        return np.empty((0, active), np.int32)
    row_bytes = tensor.nb[1]
    stored = np.frombuffer(view(tensor.data, row_bytes * (tokens - 1) + active * sizeof(c_int32)), np.int32)
    return np.lib.stride_tricks.as_strided(stored, (tokens, active), (row_bytes, tensor.nb[0]))


class _Finder:
    """Callback that records in one pass which expert tensors use which node's indices."""

    def __init__(self, library: Library, file: GgufFile, addresses: Mapping[int, ExpertTensor]) -> None:
        self._by_indices = library.op(b"MUL_MAT_ID")
        self._harmless = {library.op(name) for name in (b"NONE", b"VIEW", b"RESHAPE", b"PERMUTE", b"TRANSPOSE")}
        self._graph = Graph(library)
        self._file = file
        self._addresses = addresses  # of expert tensors
        self.order: list[tuple[int, bytes]] = []  # of all nodes: address, name
        self.used: dict[int, list[ExpertTensor]] = {}  # by the routing node's address
        self.active: dict[int, int] = {}
        self.error: UnsupportedModelError | None = None

    def __call__(self, address: int, ask: bool) -> bool:  # noqa: ARG002, FBT001 - llama.cpp's signature
        tensor = node_at(address)
        self.order.append((address, tensor.name))
        self._graph.add(address)
        if self.error is None:
            try:
                self._take(tensor)
            except UnsupportedModelError as error:
                self.error = error
        return False

    def _take(self, tensor: Tensor) -> None:
        sources = [node_at(source) for source in tensor.src if source]
        if tensor.op != self._by_indices:
            for source in sources:
                if tensor.op not in self._harmless and source.data in self._addresses:
                    raise self._refused(f"{source.name.decode()} is used by an operation other than MUL_MAT_ID")
            return
        weights, indices = sources[0], sources[2]
        known = self._addresses.get(weights.data or 0)
        if known is None:
            if weights.name.decode() in self._file.tensors:
                raise self._refused(f"{weights.name.decode()} holds experts, but its address or kind is unexpected")
            raise self._refused(f"experts of {tensor.name.decode()} are computed, not used as stored")
        if tuple(weights.ne[:3]) != known.info.shape or weights.nb[2] != known.expert_bytes:
            raise self._refused(f"{known.info.name} has another layout than in its file")
        if indices.type != _I32 or not indices.name:
            raise self._refused(f"the indices for {known.info.name} are ambiguous")
        self.used.setdefault(tensor.src[2], []).append(known)
        self.active[tensor.src[2]] = indices.ne[0]

    def layer(self, routing: int, name: bytes) -> MoELayer:
        """The MoE layer of a routing node."""
        tensors = tuple(dict.fromkeys(self.used[routing]))
        return MoELayer(name, tensors, self.active[routing], self._graph.probe(routing, tensors[0].experts))

    def _refused(self, reason: str) -> UnsupportedModelError:
        return refused(self._file, reason)


def refused(file: GgufFile, reason: str) -> UnsupportedModelError:
    """The error for a model whose experts can't be offloaded."""
    return UnsupportedModelError(
        f"{file.name}: experts of {file.architecture!r} can't be offloaded: {reason}; run it with llama.cpp"
    )


def find_structure(library: Library, file: GgufFile, starts: Mapping[int, int], run_pass: RunPass) -> Structure:
    """Find the MoE layers, with three passes over one token.

    Args:
        library: the loaded library.
        file: the model's headers.
        starts: by file, the address of its first byte.
        run_pass: runs one token; experts may be zeros.

    Raises:
        UnsupportedModelError: the graph uses experts in an unsupported way.
    """
    addresses = {starts[each.info.file] + each.info.offset_bytes: each for each in file.expert_tensors}
    finder = _Finder(library, file, addresses)
    run_pass(finder)
    if finder.error is not None:
        raise finder.error
    layers = [finder.layer(address, name) for address, name in finder.order if address in finder.used]
    if len(layers) != len(finder.used):
        raise refused(file, "expert indices do not come from a graph node")
    names = [layer.routing for layer in layers]
    if sum(name in set(names) for _, name in finder.order) != len(names):
        raise refused(file, "routing nodes share names with other nodes")
    if not layers:
        raise refused(file, "its graph has no routing node")
    _refuse_shared(file, layers)
    _try_callbacks(file, layers, run_pass)
    known = {tensor for layer in layers for tensor in layer.tensors}
    return Structure(tuple(layers), tuple(each for each in file.expert_tensors if each not in known))


def _refuse_shared(file: GgufFile, layers: Sequence[MoELayer]) -> None:
    """Every expert tensor must belong to one layer, and a layer's tensors must have equal numbers of experts."""
    owners: dict[ExpertTensor, bytes] = {}
    for layer in layers:
        if len({tensor.experts for tensor in layer.tensors}) > 1:
            raise refused(file, f"{layer.routing.decode()} is used with different numbers of experts")
        for tensor in layer.tensors:
            if owners.setdefault(tensor, layer.routing) != layer.routing:
                raise refused(file, f"{tensor.info.name} is used in two layers")


def _try_callbacks(file: GgufFile, layers: Sequence[MoELayer], run_pass: RunPass) -> None:
    """Check that each routing node's callback receives its indices, and that returning False aborts the pass."""
    names = {layer.routing for layer in layers}
    seen: list[bytes] = []
    wrong: list[bytes] = []
    calls_after_stop = 0

    def take(address: int, ask: bool) -> bool:  # noqa: FBT001 - llama.cpp's signature
        tensor = node_at(address)
        if ask:
            return tensor.name in names
        seen.append(tensor.name)
        indices = read_indices(tensor)
        layer = layers[min(len(seen), len(layers)) - 1]
        if indices.shape != (1, layer.active) or indices.min() < 0 or indices.max() >= layer.tensors[0].experts:
            wrong.append(tensor.name)
        return True

    def stop(address: int, ask: bool) -> bool:  # noqa: FBT001 - llama.cpp's signature
        nonlocal calls_after_stop
        calls_after_stop += bool(seen)
        if ask:
            return name_of(address) in names
        seen.append(name_of(address))
        return False

    status = run_pass(take)
    if status or wrong or seen != [layer.routing for layer in layers]:
        raise refused(file, f"of {len(layers)} layers, {len(seen)} reported their routing, {len(wrong)} wrongly")
    seen.clear()
    run_pass(stop)
    if len(seen) != 1 or calls_after_stop:
        raise refused(file, "a callback can't abort its pass")
