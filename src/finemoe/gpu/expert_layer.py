"""An MoE layer on devices: the host waits for the device once, to know the routing, and launches everything else.

A layer runs in waves: a wave is all experts that are ready at that moment. The model's thread reads the executed
indices back, launches the resident experts, then those that arrive, each after its arrival event, and goes on to the
next layer while the device copies and computes. `compute_eager` reproduces transformers' eager experts, one expert at a
time; `compute_grouped` its `grouped_mm` experts, one grouped matmul per wave.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from finemoe.checkpoint import LayerLayout
from finemoe.engine.engine import Engine
from finemoe.engine.expert_layer import Accumulator, ExpertLayer, Views, apply_expert
from finemoe.engine.token_dispatch import group_rows
from finemoe.gpu.counters import DeviceHitCounter, StallCounter
from finemoe.gpu.grouped_gemm import apply_experts, group_pairs, plan_groups, split_slots, stack_slots
from finemoe.gpu.hybrid_cpu import MAX_TOKENS, HostCompute, HybridSplit
from finemoe.gpu.slot_pool import Arrival, DeviceSlotPool

Wave = list[tuple[int, int]]  # expert, slot


class DeviceExpertLayer(ExpertLayer):
    """An `ExpertLayer` whose experts are on devices. Inputs and outputs are on the first of them.

    Args:
        layout: of an expert's parameters in a device's slot, as the module takes them.
        pool: the devices' slots.
        stalls: counts the time that devices wait for experts.
        hits: counts hits where the host does not know the routing.

    Attributes:
        first_slot: of expert 0, where each expert of the model has a slot of its own.
        host_compute: computes misses of few tokens on the host where that is faster; `None`: disabled.
        single_expert_waves: for trials: every wave has one expert.
    """

    def __init__(
        self,
        engine: Engine,
        lock: threading.RLock,
        layer: int,
        layout: LayerLayout,
        dtypes: dict[str, torch.dtype],
        pool: DeviceSlotPool,
        *,
        stalls: StallCounter,
        hits: DeviceHitCounter,
        views: Views | None = None,
    ) -> None:
        super().__init__(engine, lock, layer, layout, dtypes, views=views)
        self.device = pool.devices[0].torch_device
        self.pool = pool
        self.first_slot: int | None = None
        self.host_compute: HostCompute | None = None
        self.single_expert_waves = False
        self._stalls = stalls
        self._hits = hits
        self._stacks: list[dict[str, Tensor]] = []
        self._resident_epoch = -1  # of the pool, in which all experts of this layer were found to be resident
        self._host_index: tuple[Tensor, Tensor] | None = None  # executed indices on the device, and their copy here
        self._host_hidden: Tensor | None = None  # [T, D], for `host_compute`

    def _run(self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if self._runs_without_routing():
            self._hits.record(index, self.layout.experts)
            own = slice(self.first_slot, (self.first_slot or 0) + self.layout.experts)
            parameters = {name: stack[own] for name, stack in self.stacks(0).items()}
            return compute_resident(module, parameters, hidden, index, weights)
        return super()._run(module, hidden, index, weights)

    def _runs_without_routing(self) -> bool:
        """Whether all experts are resident for good, and neither policy nor statistics need the executed indices."""
        engine, pool = self.engine, self.pool
        assert engine is not None
        if self.first_slot is None or self.kernel != "grouped_mm" or pool.resident < pool.slots:
            return False
        cache_manager = engine.cache_manager
        if (
            (self.read_gates is not None and engine.deciding)
            or cache_manager.source_counts is not None
            or cache_manager.expert_counts is not None
        ):
            return False
        if self._resident_epoch != pool.epoch:
            for slot in range(self.first_slot, self.first_slot + self.layout.experts):
                self._await_arrival(slot)
            self._resident_epoch = pool.epoch
        return True

    def _observe_gates(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        """Copies executed indices, and gates that the policy uses, to the host: the only wait for the device."""
        gates = None if self.read_gates is None else self.read_gates(index, weights)
        few_tokens = self.host_compute is not None and 0 < len(hidden) <= MAX_TOKENS
        more = [*([] if gates is None else [gates]), *([hidden] if few_tokens else [])]
        host_index, *copies = self.pool.devices[0].read_back([index, *more])
        self._host_index = index, host_index
        self._host_hidden = copies.pop() if few_tokens else None
        self._store_gates(copies[0] if copies else None)
        self._stalls.collect()

    def index_on_host(self, index: Tensor) -> Tensor:
        """Executed indices in host memory."""
        if self._host_index is None or self._host_index[0] is not index:
            self._host_index = index, self.pool.devices[0].read_back([index])[0]
        return self._host_index[1]

    def split_with_host(self, module: nn.Module, tokens: Mapping[int, Sequence[int]]) -> HybridSplit | None:
        """How this call's misses are split between device and host; `None` if the host computes nothing.

        Args:
            tokens: of each expert's rows.
        """
        if self.host_compute is None or self._host_hidden is None:
            return None
        return HybridSplit(self.host_compute, module, self.layer, self._host_hidden, tokens)

    def compute(
        self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor, accumulator: Accumulator
    ) -> Tensor:
        if self.kernel == "grouped_mm":
            return compute_grouped(self, module, hidden, index, weights)
        return compute_eager(self, module, hidden, index, weights, accumulator)

    def serve(self, experts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """One expert at a time; kernels launched from then on run after its arrival."""
        with closing(super().serve(experts)) as serving:  # type: ignore[type-var] # a generator
            for expert, slot in serving:
                self._await_arrival(slot)
                yield expert, slot
                self.pool.record_use(slot, self.pool.devices[self.pool.device_of_slot(slot)].record_compute())

    def waves(self, experts: Sequence[int], split: HybridSplit | None = None) -> Iterator[tuple[int, Wave]]:
        """Device number and experts of each wave. Kernels that read its slots must be launched before the next step.

        Experts that `split` gives to the host are in no wave.
        """
        assert self.engine is not None
        event, computed_on_host = self.routed_event(experts), None if split is None else split.choose
        idle = [device.record_compute() for device in self.pool.devices]  # from here on they have nothing to compute
        with closing(self.engine.serve_waves(event, computed_on_host)) as serving:  # type: ignore[type-var]
            for ready in serving:
                for device, wave in self._split_wave(ready):
                    for _, slot in wave:
                        if (arrival := self._await_arrival(slot)) is not None:
                            self._stalls.record(idle[device], arrival)
                    yield device, wave
                    idle[device] = self.pool.devices[device].record_compute()
                    for _, slot in wave:
                        self.pool.record_use(slot, idle[device])

    def stacks(self, device: int) -> dict[str, Tensor]:
        """All slots of a device as parameters `[C, ..]`, by name."""
        if not self._stacks:
            self._stacks = [stack_slots(memory, self.layout) for memory in self.pool.memory]
        return self._stacks[device]

    def close(self) -> None:
        super().close()
        self._stacks.clear()
        self._host_index = self._host_hidden = self.host_compute = None

    def _await_arrival(self, slot: int) -> Arrival | None:
        """Kernels launched from now on run after the slot's arrival. Returns it if this is its first use."""
        arrival = self.pool.arrival(slot)
        if arrival is not None:
            self.pool.clear_arrival(slot)
            if not arrival.end.done():
                self.pool.devices[self.pool.device_of_slot(slot)].compute_wait(arrival.end)
        return arrival

    def _split_wave(self, ready: Wave) -> Iterator[tuple[int, Wave]]:
        """Experts that have arrived, together for each device, by slot; then the others one by one."""
        arrived = [pair for pair in ready if not self.single_expert_waves and self.pool.has_arrived(pair[1])]
        for device in range(len(self.pool.devices)):
            own = (pair for pair in arrived if self.pool.device_of_slot(pair[1]) == device)
            if wave := sorted(own, key=lambda pair: pair[1]):
                yield device, wave
        taken = set(arrived)
        for pair in ready:
            if pair not in taken:
                yield self.pool.device_of_slot(pair[1]), [pair]


def compute_eager(
    layer: DeviceExpertLayer, module: Any, hidden: Tensor, index: Tensor, weights: Tensor, accumulator: Accumulator
) -> Tensor:
    """`compute_as_ready` on devices: the same matmuls on the same rows, added up in the same order."""
    dtype = {"hidden": hidden.dtype, "weights": weights.dtype, "float32": torch.float32}[accumulator]
    output = torch.zeros_like(hidden, dtype=dtype)  # [T, D]
    rows = group_rows(layer.index_on_host(index), layer.layout.experts)
    if not rows:
        return output.to(hidden.dtype)
    first, devices = layer.pool.devices[0], layer.pool.devices
    sizes = [len(k) for k, _ in rows.values()]
    both = first.upload(torch.stack([torch.cat(part) for part in zip(*rows.values(), strict=True)]))  # k, token [2, n]
    pairs = dict(zip(rows, zip(*(part.split(sizes) for part in both), strict=True), strict=True))
    order = iter(rows)
    following = next(order, None)  # the next to add
    results: dict[int, Tensor] = {}  # computed, not added yet
    split = layer.split_with_host(module, {expert: t.tolist() for expert, (_, t) in rows.items()})
    with closing(layer.waves(tuple(rows), split)) as waves:  # type: ignore[type-var] # a generator
        for device, wave in waves:
            for expert, slot in wave:
                k, t = pairs[expert]
                x = hidden[t].to(devices[device].torch_device)
                result = apply_expert(module, layer.parameters(expert, slot), x).to(layer.device)
                results[expert] = (result * weights[t, k, None]).to(dtype)
            while following in results:
                output.index_add_(0, pairs[following][1], results.pop(following))
                following = next(order, None)
    for expert, computed in split.results() if split is not None else ():
        k, t = pairs[expert]
        results[expert] = (first.upload(computed) * weights[t, k, None]).to(dtype)
    while following in results:
        output.index_add_(0, pairs[following][1], results.pop(following))
        following = next(order, None)
    return output.to(hidden.dtype)


def compute_grouped(layer: DeviceExpertLayer, module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """What transformers' `grouped_mm` computes with all experts in memory, in waves."""
    tokens, active = index.shape
    rows = group_pairs(layer.index_on_host(index), layer.layout.experts)
    if not rows:
        return torch.zeros_like(hidden)
    first, scale = layer.pool.devices[0], weights.reshape(-1)
    parts: Tensor | None = None  # [T * K, D]
    split = layer.split_with_host(module, {expert: [pair // active for pair in own] for expert, own in rows.items()})
    with closing(layer.waves(tuple(rows), split)) as waves:  # type: ignore[type-var] # a generator
        for device, wave in waves:
            torch_device, start = layer.pool.devices[device].torch_device, layer.pool.starts[device]
            for part in split_slots([slot for _, slot in wave]):
                slot_pairs = [(slot - start, rows[expert]) for expert, slot in wave[part]]
                pairs, which, groups = plan_groups(slot_pairs, active, first.upload)
                x = hidden[which].to(torch_device)
                result = apply_experts(module, layer.stacks(device), x, groups.to(torch_device))
                result = result.to(layer.device) * scale[pairs, None]
                if parts is None:
                    parts = result.new_zeros(tokens * active, result.shape[1])
                parts.index_copy_(0, pairs, result)
    for expert, computed in split.results() if split is not None else ():
        pairs = first.upload(torch.tensor(rows[expert]))
        result = first.upload(computed) * scale[pairs, None]
        if parts is None:
            parts = result.new_zeros(tokens * active, result.shape[1])
        parts.index_copy_(0, pairs, result)
    assert parts is not None
    return parts.view(tokens, active, -1).sum(1).to(hidden.dtype)


def compute_resident(
    module: Any, parameters: dict[str, Tensor], hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """Transformers' own `grouped_mm` function on a layer whose experts are all resident.

    Args:
        module: the experts module, with `LazyParameter`s in its `__dict__`.
        parameters: `[E, ..]` by name.
        hidden: `[T, D]`.
        index: executed experts `[T, K]`.
        weights: `[T, K]`.
    """
    lazy = {name: module.__dict__[name] for name in parameters}
    module.__dict__.update(parameters)
    try:
        output: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden, index, weights)
    finally:
        module.__dict__.update(lazy)
    return output


def grouped_is_exact(layer: DeviceExpertLayer, module: nn.Module, width: int, dtype: torch.dtype) -> bool | None:
    """Whether `compute_grouped` gives the same bits however experts are split into waves, on the module's weights.

    Args:
        width: `D` of the module's input.
        dtype: of the hidden states.

    Returns:
        `None` if it can't run these experts, or differs from `compute_eager` by more than rounding.
    """
    assert layer.engine is not None and layer.accumulator is not None
    experts = min(4, layer.layout.experts)
    generator = torch.Generator().manual_seed(0)
    same = True
    with torch.no_grad():
        for tokens in (1, 5, 64):
            index = torch.stack([torch.randperm(experts, generator=generator) for _ in range(tokens)])
            given = torch.randn(tokens, width, generator=generator).to(dtype), index, torch.rand(tokens, experts)
            hidden, index, weights = (each.to(layer.device) for each in given)
            eager = compute_eager(layer, module, hidden, index, weights, layer.accumulator).float()
            try:
                one_wave = compute_grouped(layer, module, hidden, index, weights)
                layer.single_expert_waves = True
                many_waves = compute_grouped(layer, module, hidden, index, weights)
            except (RuntimeError, ValueError, KeyError, AttributeError):  # a shape or dtype that it can't run
                return None
            finally:
                layer.single_expert_waves = False
            error = (one_wave.float() - eager).norm() / eager.norm().clamp_min(1e-12)
            if not error < 0.05:  # rounding in bfloat16 is 0.004
                return None
            same = same and torch.equal(one_wave, many_waves)
    return same
