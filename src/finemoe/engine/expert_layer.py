"""The one function that transformers calls for every experts module, and its slow plain twin.

It branches on the layout attributes that transformers puts on experts modules (`is_transposed`, `has_bias`, `has_gate`,
`has_post_expert_norm`), never on a model's name. Whether this arithmetic equals a module's own, bit for bit, is tried
at load (`choose_path`); a module for which it does not runs by its own `forward`, the twin, one expert at a time.
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
from finemoe.engine.token_dispatch import rows_of
from finemoe.errors import FinemoeError
from finemoe.store import SlotPool
from finemoe.store.quantization import Dequantizer
from finemoe.types import Routed

IMPLEMENTATION = "finemoe"
HANDLE = "finemoe_layer"  # the attribute of an experts module that holds its ExpertLayer
Accumulator = Literal["hidden", "weights", "float32"]
Floats = npt.NDArray[np.float32]
Listen = Callable[[Tensor, Tensor], Tensor | None]  # ids, weights -> gates, lookahead [B, 1 + n, E]; B may be left out
Kernel = Literal["eager", "grouped_mm"]  # whose arithmetic
# a slot's bytes as tensors: by what fields lie in it, then by the slot and their offsets
Views = dict[tuple[Any, ...], dict[tuple[int, tuple[int, ...]], dict[str, Tensor]]]
ACCUMULATORS: tuple[Accumulator, ...] = ("hidden", "weights", "float32")


class ExpertLayer:
    """What an experts module holds in place of its weights.

    Args:
        engine: hands out slots.
        lock: held while a layer runs; shared by all layers of a model, its passes, and whoever closes it.
        layer: index of this MoE layer.
        layout: how an expert lies in a slot.
        dtypes: of the module's parameters, by name; a slot in another dtype is cast on use.
        dequantizer: restores what is stored quantized; may be shared by all layers of a model, as the lock is.
        views: of the engine's slots, shared by all layers of a model: by the thousand they take memory too.
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
        self.engine: Engine | None = engine
        self.layer = layer
        self.layout = layout
        self.accumulator: Accumulator | None = None  # None: the twin
        self.listen: Listen | None = None  # set where the policy wants to know what the gate said
        self._said: tuple[Floats | None, Floats | None] = None, None
        self._active = 0  # K, of the call under way
        self._lock = lock
        self._dtypes = dtypes
        self._dequantizer = dequantizer or Dequantizer()
        form = tuple((field.name, field.dtype, field.stored_shape) for field in layout.fields)
        self._views = ({} if views is None else views).setdefault(form, {})
        self._as_stored = all(field.in_place and field.dtype == dtypes.get(field.name) for field in layout.fields)
        # twin: an expert, its parameters, its serving
        self._held: tuple[int, dict[str, Tensor], Iterator[tuple[int, int]]] | None = None

    def run(self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        """The module's output `[T, D]` for hidden `[T, D]`, executed indices and weights `[T, K]`."""
        if torch.is_grad_enabled() and hidden.requires_grad:
            raise FinemoeError("offloaded experts have no gradients; run the model under torch.no_grad()")
        with self._lock:
            if self.engine is None:
                raise FinemoeError("this model was closed: its experts are gone; load it again")
            self.engine.counters.layer_calls += 1
            return self._run(module, hidden, index, weights)

    def _run(self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        self._active = index.shape[1]
        self._hear(hidden, index, weights)
        if self.accumulator is None:
            return compute_reference(self, module, hidden, index, weights)
        return self.compute(module, hidden, index, weights, self.accumulator)

    def _hear(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        """Take down what the policy wants to know of the gate."""
        del hidden
        if self.listen is not None:
            self._take_down(self.listen(index, weights))

    def _take_down(self, said: Tensor | None) -> None:
        """Keep what a listener has said, in host memory."""
        self._said = None, None
        if said is not None:
            rows = said.numpy().reshape(-1, *said.shape[-2:])
            gates, ahead = np.ascontiguousarray(rows[:, 0]), np.ascontiguousarray(rows[:, 1:])  # as kernels want them
            self._said = gates, ahead if ahead.shape[1] else None

    def compute(
        self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor, accumulator: Accumulator
    ) -> Tensor:
        """`run`, by our own arithmetic."""
        return compute_as_ready(self, module, hidden, index, weights, accumulator)

    def serve(self, experts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """`Engine.serve` for this layer."""
        assert self.engine is not None
        return self.engine.serve(self.event(experts))

    def event(self, experts: Sequence[int]) -> Routed:
        """That it needs these."""
        return Routed(self.layer, experts, *self._said, self._active)

    def parameters(self, expert: int, slot: int) -> dict[str, Tensor]:
        """One expert's parameters by name, out of its slot; without a copy wherever the checkpoint's layout allows.

        Quantized ones are valid until the next call.
        """
        offsets_bytes = self.layout.offsets_bytes[expert]
        views = self._views.get((slot, offsets_bytes))
        if views is None:
            assert self.engine is not None
            views = slot_views(self.engine.pool, slot, self.layout.fields, offsets_bytes)
            self._views[slot, offsets_bytes] = views
        if self._as_stored:
            return views
        stored = {f.name: views[f.name] if f.in_place else f.restore(views[f.name]) for f in self.layout.fields}
        plain = {name: tensor.to(self._dtypes[name]) for name, tensor in stored.items() if name in self._dtypes}
        return plain | self._dequantizer.restore(self.layout, stored, self._dtypes)

    def hold(self, expert: int) -> dict[str, Tensor]:
        """Twin: the parameters of one expert, valid until another one is held or `release` is called."""
        if self._held is None or self._held[0] != expert:
            self.release()
            serving = self.serve([expert])
            _, slot = next(serving)
            self._held = expert, self.parameters(expert, slot), serving
        return self._held[1]

    def release(self) -> None:
        """Twin: let go of the held expert."""
        held, self._held = self._held, None  # forgotten first: what fails to end must not be used again
        if held is not None:
            next(held[2], None)

    def close(self) -> None:
        self.engine = None
        self._views.clear()


class LazyParameter:
    """Stands for a stripped parameter `[E, ..]` in a module's `__dict__`, so that the module's own code finds it."""

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


def slot_views(pool: SlotPool, slot: int, fields: Sequence[Field], offsets_bytes: Sequence[int]) -> dict[str, Tensor]:
    """A slot's bytes as the tensors that the checkpoint stores, by parameter name. Shared, not copied."""
    return field_views(pool.bytes_of(slot), fields, offsets_bytes)


def field_views(raw: Tensor, fields: Sequence[Field], offsets_bytes: Sequence[int]) -> dict[str, Tensor]:
    """One expert's bytes, uint8, as the tensors that they hold, by parameter name. Shared, not copied."""
    return {
        field.name: raw[offset_bytes : offset_bytes + field.length_bytes].view(field.dtype).view(field.stored_shape)
        for field, offset_bytes in zip(fields, offsets_bytes, strict=True)
    }


def finemoe_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts function registered with transformers."""
    layer: ExpertLayer | None = self.__dict__.get(HANDLE)
    if layer is None:
        raise FinemoeError("experts_implementation='finemoe' needs a model loaded by finemoe.load()")
    return layer.run(self, hidden_states, top_k_index, top_k_weights)


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, finemoe_experts)


def compute_as_ready(
    layer: ExpertLayer, module: Any, hidden: Tensor, index: Tensor, weights: Tensor, accumulator: Accumulator
) -> Tensor:
    """Computes experts as they become ready, and adds their results up in ascending order of experts.

    The order of the additions, and so every rounding, is that of eager, whatever was resident.
    """
    dtype = {"hidden": hidden.dtype, "weights": weights.dtype, "float32": torch.float32}[accumulator]
    output = torch.zeros_like(hidden, dtype=dtype)  # [T, D]
    rows = rows_of(hidden, index, weights, layer.layout.experts)
    order = iter(rows.experts)
    turn = next(order, None)
    early: dict[int, Tensor] = {}  # computed before their turn
    with closing(layer.serve(rows.experts)) as serving:  # type: ignore[type-var] # a generator
        for expert, slot in serving:
            x, scale = rows.of(expert)
            early[expert] = (apply_expert(module, layer.parameters(expert, slot), x) * scale).to(dtype)
            while turn in early:
                rows.add(output, turn, early.pop(turn))
                turn = next(order, None)
    return output.to(hidden.dtype)


def apply_expert(module: Any, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """One expert on its rows `[n, D]`, by the module's layout attributes."""
    up = "gate_up_proj" if module.has_gate else "up_proj"
    x = _project(module, parameters, up, x)
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = _project(module, parameters, "down_proj", x)
    # a flag that older transformers does not know
    return module.post_expert_norm(x) if getattr(module, "has_post_expert_norm", False) else x


def _project(module: Any, parameters: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    x = x @ parameters[name] if module.is_transposed else F.linear(x, parameters[name])
    return x + parameters[f"{name}_bias"] if module.has_bias else x


def compute_reference(layer: ExpertLayer, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """The module's own `forward`, over parameters that are fetched as they are indexed."""
    own: Callable[..., Tensor] = type(module).forward.__wrapped__  # type: ignore[attr-defined]
    try:
        return own(module, hidden, index, weights)
    finally:
        layer.release()


def choose_path(layer: ExpertLayer, module: nn.Module, width: int, dtype: torch.dtype) -> Accumulator | None:
    """Which way of adding up makes `compute_as_ready` equal to the twin, bit for bit, on this module's own weights.

    Args:
        width: `D` of the module's input.
        dtype: of the hidden states.

    Returns:
        The accumulator, or `None` where only the twin will do, or where these weights can't tell (all zero).
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
            except (AttributeError, KeyError, RuntimeError, TypeError):  # not the shape of module that it can run
                return None
            if equal:
                return accumulator
    return None
