"""The experts function registered with transformers, and the module's own `forward` as its exact reference.

The arithmetic branches on the layout attributes that transformers sets on experts modules (`is_transposed`, `has_bias`,
`has_gate`, `has_post_expert_norm`), never on a model's name. At load, `choose_accumulator` checks that it equals the
module's own `forward` bit for bit; a module for which it does not runs by that `forward`, one expert at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the name that torch users know
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from finemoe.checkpoint import Field, LayerLayout
from finemoe.engine.engine import Engine
from finemoe.engine.token_dispatch import dispatch_tokens
from finemoe.errors import FinemoeError
from finemoe.store.quantization import Dequantizer
from finemoe.types import Routed

IMPLEMENTATION = "finemoe"  # `experts_implementation`
HANDLE = "finemoe_layer"  # attribute of an experts module that holds its ExpertLayer
Accumulator = Literal["hidden", "weights", "float32"]  # dtype in which experts' results are added up
ACCUMULATORS: tuple[Accumulator, ...] = ("hidden", "weights", "float32")
Kernel = Literal["eager", "grouped_mm"]  # the experts implementation of transformers whose results are reproduced
# executed indices, weights [T, K] -> gate distributions and lookahead [B, 1 + n, E], or [1 + n, E] for one request
ReadGates = Callable[[Tensor, Tensor], Tensor | None]
# tensors over slots: by the layout's fields, then by slot and the fields' offsets, then by parameter name
Views = dict[tuple[Any, ...], dict[tuple[int, tuple[int, ...]], dict[str, Tensor]]]
_Floats = npt.NDArray[np.float32]


def finemoe_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts function registered with transformers. `self` is the experts module."""
    layer: ExpertLayer | None = self.__dict__.get(HANDLE)
    if layer is None:
        raise FinemoeError("experts_implementation='finemoe' needs a model loaded by finemoe.load()")
    return layer.run(self, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, finemoe_experts)


class ExpertLayer:
    """Runs one MoE layer's experts; an experts module holds it instead of its weights.

    Args:
        engine: provides slots.
        lock: held while a layer runs; shared by all layers of a model, its forward passes, and `close`.
        layer: index of this MoE layer.
        layout: of an expert's parameters in a slot.
        dtypes: of the module's parameters, by name; slots in another dtype are cast on use.
        dequantizer: restores quantized parameters; may be shared by all layers, as the lock is.
        views: cache of tensors over slots, shared by all layers to save memory.

    Attributes:
        accumulator: `None`: the module's own `forward` is used.
        read_gates: set if the policy uses gate distributions.
    """

    device = torch.device("cpu")  # of its inputs and outputs
    kernel: Kernel = "eager"

    def __init__(
        self,
        engine: Engine,
        lock: threading.RLock,
        layer: int,
        layout: LayerLayout,
        dtypes: dict[str, torch.dtype],
        dequantizer: Dequantizer | None = None,
        views: Views | None = None,
    ) -> None:
        self.engine: Engine | None = engine  # None: closed
        self.layer = layer
        self.layout = layout
        self.accumulator: Accumulator | None = None
        self.read_gates: ReadGates | None = None
        self._gates: tuple[_Floats | None, _Floats | None] = None, None  # [B, E], lookahead [B, n, E]
        self._active = 0  # K of the current call
        self._lock = lock
        self._dtypes = dtypes
        self._dequantizer = dequantizer or Dequantizer()
        key = tuple((field.name, field.dtype, field.stored_shape) for field in layout.fields)
        self._views = ({} if views is None else views).setdefault(key, {})
        self._as_stored = all(field.in_place and field.dtype == dtypes.get(field.name) for field in layout.fields)
        # by `hold`: the expert, its parameters, its iterator of `serve`
        self._held: tuple[int, dict[str, Tensor], Iterator[tuple[int, int]]] | None = None

    def run(self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The module's output `[T, D]` for hidden states `[T, D]`, executed indices and routing weights `[T, K]`.

        Raises:
            FinemoeError: gradients are requested, or the model was closed.
            ExpertReadError: an expert's bytes can't be read.
        """
        if torch.is_grad_enabled() and hidden.requires_grad:
            raise FinemoeError("offloaded experts have no gradients; run the model under torch.no_grad()")
        with self._lock:
            if self.engine is None:
                raise FinemoeError("this model was closed: its experts are gone; load it again")
            self.engine.counters.layer_calls += 1
            return self._run(module, hidden, index, weights)

    def _run(self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self._active = index.shape[1]
        self._observe_gates(hidden, index, weights)
        if self.accumulator is None:
            return compute_reference(self, module, hidden, index, weights)
        return self.compute(module, hidden, index, weights, self.accumulator)

    def _observe_gates(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        """Reads the gate distributions that the policy uses, for this call's `routed_event`."""
        del hidden
        if self.read_gates is not None:
            self._store_gates(self.read_gates(index, weights))

    def _store_gates(self, rows: Tensor | None) -> None:
        """Keeps what `ReadGates` returned, in host memory."""
        self._gates = None, None
        if rows is not None:
            stacked = rows.numpy().reshape(-1, *rows.shape[-2:])
            gates, lookahead = np.ascontiguousarray(stacked[:, 0]), np.ascontiguousarray(stacked[:, 1:])
            self._gates = gates, lookahead if lookahead.shape[1] else None

    def compute(
        self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor, accumulator: Accumulator
    ) -> Tensor:
        """The output by our own arithmetic; arguments as in `run`."""
        return compute_as_ready(self, module, hidden, index, weights, accumulator)

    def serve(self, experts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """`Engine.serve` for this layer."""
        assert self.engine is not None
        return self.engine.serve(self.routed_event(experts))

    def routed_event(self, experts: Sequence[int]) -> Routed:
        """The event for this layer, which needs these experts; with the current call's gates."""
        return Routed(self.layer, experts, *self._gates, self._active)

    def parameters(self, expert: int, slot: int) -> dict[str, Tensor]:
        """One expert's parameters by name: views of its slot where the stored form allows, otherwise converted.

        Dequantized parameters are valid until the next call.
        """
        offsets_bytes = self.layout.offsets_bytes[expert]
        views = self._views.get((slot, offsets_bytes))
        if views is None:
            assert self.engine is not None
            views = field_views(self.engine.pool.bytes_of(slot), self.layout.fields, offsets_bytes)
            self._views[slot, offsets_bytes] = views
        if self._as_stored:
            return views
        stored = {f.name: views[f.name] if f.in_place else f.restore(views[f.name]) for f in self.layout.fields}
        plain = {name: tensor.to(self._dtypes[name]) for name, tensor in stored.items() if name in self._dtypes}
        return plain | self._dequantizer.restore(self.layout, stored, self._dtypes)

    def hold(self, expert: int) -> dict[str, Tensor]:
        """One expert's parameters for `compute_reference`, valid until another is held or `release` is called."""
        if self._held is None or self._held[0] != expert:
            self.release()
            serving = self.serve([expert])
            _, slot = next(serving)
            self._held = expert, self.parameters(expert, slot), serving
        return self._held[1]

    def release(self) -> None:
        """Unpins the held expert."""
        held, self._held = self._held, None  # cleared first, so that an interrupted release leaves no stale expert
        if held is not None:
            next(held[2], None)

    def close(self) -> None:
        self.engine = None
        self._views.clear()


class LazyParameter:
    """Replaces a parameter `[E, ..]` in a module's `__dict__`; indexing it by an expert loads that expert."""

    def __init__(self, layer: ExpertLayer, name: str, meta: Tensor) -> None:
        self._layer = layer
        self._name = name
        self.shape = meta.shape
        self.dtype = meta.dtype
        self.ndim = meta.ndim
        self.device = layer.device

    def __getitem__(self, expert: int | Tensor) -> Tensor:
        return self._layer.hold(int(expert))[self._name]

    def __len__(self) -> int:
        return self.shape[0]

    def size(self, dim: int | None = None) -> torch.Size | int:
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim


def compute_as_ready(
    layer: ExpertLayer, module: Any, hidden: Tensor, index: Tensor, weights: Tensor, accumulator: Accumulator
) -> Tensor:
    """Computes experts as they become ready, and adds their results in ascending order of experts.

    So the order of additions, and with it every rounding, is that of transformers' eager experts, whatever is resident.
    """
    dtype = {"hidden": hidden.dtype, "weights": weights.dtype, "float32": torch.float32}[accumulator]
    output = torch.zeros_like(hidden, dtype=dtype)  # [T, D]
    dispatch = dispatch_tokens(hidden, index, weights, layer.layout.experts)
    order = iter(dispatch.experts)
    following = next(order, None)  # the next to add
    results: dict[int, Tensor] = {}  # computed, not added yet
    with closing(layer.serve(dispatch.experts)) as serving:  # type: ignore[type-var] # a generator
        for expert, slot in serving:
            x, scale = dispatch.rows(expert)
            results[expert] = (apply_expert(module, layer.parameters(expert, slot), x) * scale).to(dtype)
            while following in results:
                dispatch.add(output, following, results.pop(following))
                following = next(order, None)
    return output.to(hidden.dtype)


def compute_reference(layer: ExpertLayer, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The module's own `forward`, over `LazyParameter`s: exact by construction, one expert at a time."""
    forward: Callable[..., Tensor] = type(module).forward.__wrapped__  # type: ignore[attr-defined]
    try:
        return forward(module, hidden, index, weights)
    finally:
        layer.release()


def choose_accumulator(layer: ExpertLayer, module: nn.Module, width: int, dtype: torch.dtype) -> Accumulator | None:
    """The accumulator with which `compute_as_ready` equals `compute_reference` bit for bit, on the module's weights.

    Args:
        width: `D` of the module's input.
        dtype: of the hidden states.

    Returns:
        `None` if none does, or if these weights can't show it (all zero).
    """
    experts = min(3, layer.layout.experts)
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(experts, generator=generator) for _ in range(5)])  # [T, K]
    cases = []
    for weights_dtype in {torch.float32, dtype}:
        hidden = torch.randn(5, width, generator=generator).to(dtype)
        weights = torch.rand(5, experts, generator=generator).to(weights_dtype)
        case = hidden.to(layer.device), index.to(layer.device), weights.to(layer.device)
        cases += [case, (case[0][:1], case[1][:1], case[2][:1])]
    with torch.no_grad():
        expected = [compute_reference(layer, module, *case) for case in cases]
        if not all(output.isfinite().all() and output.any() for output in expected):
            return None
        for accumulator in ACCUMULATORS:
            try:
                equal = all(
                    torch.equal(layer.compute(module, *case, accumulator), output)
                    for case, output in zip(cases, expected, strict=True)
                )
            except (AttributeError, KeyError, RuntimeError, TypeError):  # a module of another form than `apply_expert`
                return None
            if equal:
                return accumulator
    return None


def apply_expert(module: Any, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """One expert's output `[n, D]` for its rows `[n, D]`, by the module's layout attributes."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    x = _project(module, parameters, up, x)
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = _project(module, parameters, "down_proj", x)
    # older transformers do not set this attribute
    return module.post_expert_norm(x) if getattr(module, "has_post_expert_norm", False) else x


def _project(module: Any, parameters: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = x @ parameters[name] if module.is_transposed else F.linear(x, parameters[name])
    return x + parameters[f"{name}_bias"] if module.has_bias else x


def field_views(raw: Tensor, fields: Sequence[Field], offsets_bytes: Sequence[int]) -> dict[str, Tensor]:
    """One expert's bytes, uint8 `[slot_bytes]`, as tensors in the stored form, by parameter name. Views, not copies."""
    return {
        field.name: raw[offset_bytes : offset_bytes + field.length_bytes].view(field.dtype).view(field.stored_shape)
        for field, offset_bytes in zip(fields, offsets_bytes, strict=True)
    }
