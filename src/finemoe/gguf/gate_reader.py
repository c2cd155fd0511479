"""Reads gate probabilities and gate inputs from graph tensors during a pass, with no extra stops of the graph.

When the routing node's callback runs, some tensors that it depends on are still in memory, because later nodes need
them: the gate's probabilities (for the weights of the chosen experts) and the gate's input (for the experts). The path
from the routing node to these tensors is found in the structure pass and is the same in every pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from finemoe.gguf.address_space import view
from finemoe.gguf.binding import Library, Tensor

Floats = npt.NDArray[np.float32]
Scale = Literal["probabilities", "sigmoid", "logits"]
_F32 = 0
_MOST_HOPS = 12
_FREE_OPS = (b"NONE", b"VIEW", b"RESHAPE", b"PERMUTE", b"TRANSPOSE")  # compute nothing
_SCALES: dict[bytes, Scale] = {b"SOFT_MAX": "probabilities", b"UNARY": "sigmoid", b"MUL_MAT": "logits"}


class Probe(NamedTuple):
    """Paths from a layer's routing node. A path is a number of steps, each to a node's first source.

    `scores` leads to the gate's output `[T, E]`, on the scale named by `scale`. `gate` leads to the matrix
    multiplication with the gate's weight; `weight` is that tensor's name. A path of 0 means that the tensor does not
    exist or that its memory is reused before the callback.
    """

    scores: int
    scale: Scale
    gate: int
    weight: str


def node_at(address: int) -> Tensor:
    """The graph node at an address; a view."""
    return Tensor.from_address(address)


class _Node(NamedTuple):
    """The properties of a node that are needed after its graph was freed."""

    op: int
    sources: tuple[int, int]  # addresses of the first two
    base: int  # address of the tensor that it is a view of, or 0
    floats: bool
    width: int
    rows: int
    name: bytes


class Graph:
    """The nodes of one pass in execution order, with the last use of each."""

    def __init__(self, library: Library) -> None:
        self._free = {library.op(name) for name in _FREE_OPS}
        self._scales = {library.op(name): scale for name, scale in _SCALES.items()}
        self._matmul = library.op(b"MUL_MAT")
        self._nodes: dict[int, _Node] = {}  # including sources
        self._index: dict[int, int] = {}
        self._computes: list[bool] = []
        self._last_use: dict[int, int] = {}

    def add(self, address: int) -> None:
        """Record the next node in execution order."""
        node = self._nodes[address] = _take(address)
        index = self._index[address] = len(self._computes)
        self._computes.append(node.op not in self._free)
        for source in node_at(address).src:
            if source:
                if source not in self._nodes:
                    self._nodes[source] = _take(source)
                self._last_use[source] = index
                self._last_use[self._nodes[source].base] = index

    def probe(self, routing: int, experts: int) -> Probe:
        """The paths from the routing node of a layer with `experts` experts."""
        kept, scores = 0, 0  # steps to the last readable tensor, and to the gate's output
        scale: Scale | None = None
        address = routing
        for hops in range(1, _MOST_HOPS + 1):
            address = self._nodes[address].sources[0]
            node = self._nodes.get(address)
            if node is None:
                break
            if node.width == experts and node.floats and self._is_kept(address, routing):
                kept = hops
            if scale is None and node.op in self._scales:
                scale = self._scales[node.op]
                scores = kept if scale == "logits" or kept == hops else 0
            if node.op == self._matmul:
                weight, hidden = (self._nodes[source] for source in node.sources)
                if weight.rows == experts and hidden.floats and self._is_kept(node.sources[1], routing):
                    return Probe(scores, scale or "logits", hops, weight.name.decode())
                break
        return Probe(scores, scale or "logits", 0, "")

    def _is_kept(self, address: int, routing: int) -> bool:
        """Whether a tensor's memory is not reused before the routing node's callback."""
        base = self._nodes[address].base or address
        last = max(self._last_use.get(address, -1), self._last_use.get(base, -1))
        between = range(last + 1, self._index[routing] + 1)
        return last >= 0 and not any(self._computes[index] for index in between)


def _take(address: int) -> _Node:
    tensor = node_at(address)
    sources = tensor.src[0] or 0, tensor.src[1] or 0
    return _Node(tensor.op, sources, tensor.view_src or 0, tensor.type == _F32, tensor.ne[0], tensor.ne[1], tensor.name)


def follow(routing: int, hops: int) -> Tensor:
    """The node at the end of a path of `hops` steps, each to the first source."""
    address = routing
    for _ in range(hops):
        address = node_at(address).src[0]
    return node_at(address)


def read_rows(tensor: Tensor) -> Floats | None:
    """The rows `[T, n]` of a float32 tensor; a view. `None` for other types or layouts, or an empty tensor."""
    width, rows = tensor.ne[0], tensor.ne[1]
    if tensor.type != _F32 or not rows or not tensor.data or tensor.nb[0] != np.dtype(np.float32).itemsize:
        return None
    stored = np.frombuffer(view(tensor.data, tensor.nb[1] * (rows - 1) + width * 4), np.float32)
    return np.lib.stride_tricks.as_strided(stored, (rows, width), (tensor.nb[1], 4))


def distribution(scores: Floats, scale: Scale) -> Floats:
    """Convert scores `[.., E]` on any scale to probabilities that sum to 1."""
    logits = scale == "logits"
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True)) if logits else np.maximum(scores, 0)
    shares: Floats = shifted / np.maximum(shifted.sum(axis=-1, keepdims=True), 1e-30)
    return shares


class GateReader:
    """Reads gates and predicted gates of later layers, in the shapes that policies expect.

    Args:
        probes: one per layer.
        weights: gate weights `[E, D]` by tensor name; only those stored as float32.
        experts: the largest `E` of any layer.
        lookahead: number of later layers to predict; 0: none.
    """

    def __init__(
        self, probes: Sequence[Probe], weights: Mapping[str, Floats], experts: int, lookahead: int = 0
    ) -> None:
        self._probes = probes
        self._weights = weights
        self._experts = experts
        self.lookahead = lookahead

    def read(self, layer: int, routing: int) -> tuple[Floats | None, Floats | None]:
        """A layer's mean gates over its tokens `[1, E]` and predictions `[1, lookahead, E]`; `None` if unavailable."""
        probe = self._probes[layer]
        gates = None
        if probe.scores and (scores := read_rows(follow(routing, probe.scores))) is not None:
            gates = self._padded(distribution(scores, probe.scale).mean(axis=0, keepdims=True))
        if gates is not None and not np.isfinite(gates).all():
            gates = None
        return gates, self._ahead(layer, routing) if self.lookahead and gates is not None else None

    def _ahead(self, layer: int, routing: int) -> Floats | None:
        """Apply the next layers' gates to this layer's hidden state; `None` for more than one token."""
        probe = self._probes[layer]
        if not probe.gate:
            return None
        hidden = read_rows(node_at(follow(routing, probe.gate).src[1]))
        if hidden is None or len(hidden) != 1:
            return None
        ahead = np.zeros((1, self.lookahead, self._experts), np.float32)
        for distance, later in enumerate(self._probes[layer + 1 : layer + 1 + self.lookahead]):
            weight = self._weights.get(later.weight)
            if weight is not None and weight.shape[1] == hidden.shape[1]:
                scale: Scale = "sigmoid" if later.scale == "sigmoid" else "logits"
                scores = hidden @ weight.T
                if scale == "sigmoid":
                    scores = 1 / (1 + np.exp(-scores))
                ahead[:, distance, : weight.shape[0]] = distribution(scores, scale)
        return ahead

    def _padded(self, gates: Floats) -> Floats:
        if gates.shape[1] == self._experts:
            return np.ascontiguousarray(gates, np.float32)
        padded = np.zeros((len(gates), self._experts), np.float32)
        padded[:, : gates.shape[1]] = gates
        return padded
