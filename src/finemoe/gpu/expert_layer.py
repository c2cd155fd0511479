"""A layer on devices: in waves of what is ready, without waiting for the device but to know the routing.

The model's thread reads the executed indices back, launches what is resident, then what arrives, each behind the event
that tells of its arrival, and goes on to the next layer while the device computes and copies. `run_waves` does the
arithmetic of transformers' eager experts, expert by expert; `run_grouped` that of its grouped ones.
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
from finemoe.gpu.grouped_gemm import apply_experts, plan_groups, rows_of_experts, stack_slots, windows
from finemoe.gpu.hybrid_cpu import MOST_TOKENS, HostCompute, HybridSplit
from finemoe.gpu.slot_pool import Arrival, DeviceSlotPool, Stalls
from finemoe.metrics import Counters


class Touched:
    """Counts distinct experts on the device, so that a hit is not waited for to be counted.

    The model's thread notes; whoever asks for statistics settles, from any thread.

    Args:
        counters: of the engine.
    """

    def __init__(self, counters: Counters) -> None:
        self.counters = counters
        self._lock = threading.Lock()
        self._hits: Tensor | None = None  # int64, on the device

    def note(self, index: Tensor, experts: int) -> None:
        """A layer of so many experts executed `index` `[T, K]`."""
        seen = torch.zeros(experts + 1, dtype=torch.int64, device=index.device)
        seen[index.reshape(-1).clamp(max=experts)] = 1
        hits = seen[:experts].sum()
        with self._lock:
            self._hits = hits if self._hits is None else self._hits.add_(hits)

    def settle(self) -> None:
        """Add what was noted to the counters. Waits for the device."""
        with self._lock:
            hits, self._hits = self._hits, None
        if hits is not None:
            self.counters.hits += int(hits)


def run_whole(module: Any, parameters: dict[str, Tensor], hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Transformers' `grouped_mm` on a layer's slots.

    Args:
        module: the experts module, which has stand-ins for its parameters in its `__dict__`.
        parameters: `[E, ..]` by name.
        hidden: `[T, D]`.
        index: executed experts `[T, K]`.
        weights: `[T, K]`.
    """
    stand_ins = {name: module.__dict__[name] for name in parameters}
    module.__dict__.update(parameters)
    try:
        output: Tensor = ALL_EXPERTS_FUNCTIONS["grouped_mm"](module, hidden, index, weights)
    finally:
        module.__dict__.update(stand_ins)
    return output


Wave = list[tuple[int, int]]  # expert, slot


class DeviceExpertLayer(ExpertLayer):
    """An `ExpertLayer` whose experts are on devices. Inputs and outputs are on the first of them.

    Args:
        pool: the devices' slots.
        stalls: is told what was waited for.
        touched: is told of hits that the host does not hear of.
        layout: how an expert lies in a slot of a device: as the module wants it.
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
        stalls: Stalls,
        touched: Touched,
        views: Views | None = None,
    ) -> None:
        super().__init__(engine, lock, layer, layout, dtypes, views=views)
        self.device = pool.devices[0].torch_device
        self.apart = False  # for trials: every expert a wave of its own
        self.pool = pool
        self._stalls = stalls
        self._stacks: list[dict[str, Tensor]] = []
        self.first: int | None = None  # the slot of its expert 0, where each expert has a slot of its own
        self._touched = touched
        self._whole = -1  # the pool's epoch in which all of its experts were found to be there
        self.host: HostCompute | None = None  # computes misses itself where that is faster
        self._known: tuple[Tensor, Tensor] | None = None  # executed indices, there and here
        self._hidden: Tensor | None = None  # [T, D] here, where the host may want it

    def _run(self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if self._is_whole():
            self._touched.note(index, self.layout.experts)
            span = slice(self.first, (self.first or 0) + self.layout.experts)
            parameters = {name: stack[span] for name, stack in self.stacks(0).items()}
            return run_whole(module, parameters, hidden, index, weights)
        return super()._run(module, hidden, index, weights)

    def _is_whole(self) -> bool:
        """Whether all experts are there to stay, and nobody wants to know which ones are used."""
        engine, pool = self.engine, self.pool
        assert engine is not None
        if self.first is None or self.kernel != "grouped_mm" or pool.resident < pool.slots:
            return False
        cache_manager = engine.cache_manager
        if (
            (self.listen is not None and engine.deciding)
            or cache_manager.source_counts is not None
            or cache_manager.expert_counts is not None
        ):
            return False
        if self._whole != pool.epoch:
            for slot in range(self.first, self.first + self.layout.experts):
                self._await(slot)
            self._whole = pool.epoch
        return True

    def _hear(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        """One small copy, of the indices and of what the policy wants to know: all that the host waits for."""
        said = None if self.listen is None else self.listen(index, weights)
        few = self.host is not None and 0 < len(hidden) <= MOST_TOKENS
        wanted = [*([] if said is None else [said]), *([hidden] if few else [])]
        ids, *heard = self.pool.devices[0].read_back([index, *wanted])
        self._known = index, ids
        self._hidden = heard.pop() if few else None
        self._take_down(heard[0] if heard else None)
        self._stalls.settle()

    def aside(self, module: nn.Module, tokens: Mapping[int, Sequence[int]]) -> HybridSplit | None:
        """The host's share of this call, where it takes one. `tokens`: of each expert's rows."""
        if self.host is None or self._hidden is None:
            return None
        return HybridSplit(self.host, module, self.layer, self._hidden, tokens)

    def ids(self, index: Tensor) -> Tensor:
        """Executed indices in host memory."""
        if self._known is None or self._known[0] is not index:
            self._known = index, self.pool.devices[0].read_back([index])[0]
        return self._known[1]

    def compute(
        self, module: nn.Module, hidden: Tensor, index: Tensor, weights: Tensor, accumulator: Accumulator
    ) -> Tensor:
        if self.kernel == "grouped_mm":
            return run_grouped(self, module, hidden, index, weights)
        return run_waves(self, module, hidden, index, weights, accumulator)

    def serve(self, experts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """One at a time, each once its bytes are there for what is launched from then on."""
        with closing(super().serve(experts)) as serving:  # type: ignore[type-var] # a generator
            for expert, slot in serving:
                self._await(slot)
                yield expert, slot
                self.pool.used(slot, self.pool.devices[self.pool.device_of(slot)].mark_compute())

    def waves(self, experts: Sequence[int], aside: HybridSplit | None = None) -> Iterator[tuple[int, Wave]]:
        """Device and experts of each wave. What reads their slots must be launched before the next step.

        Experts that `aside` takes on are in none.
        """
        assert self.engine is not None
        event, computed_on_host = self.event(experts), None if aside is None else aside.choose
        free = [device.mark_compute() for device in self.pool.devices]  # from here on they have nothing to do
        with closing(self.engine.serve_waves(event, computed_on_host)) as serving:  # type: ignore[type-var]
            for ready in serving:
                for at, wave in self._split(ready):
                    for _, slot in wave:
                        if (arrival := self._await(slot)) is not None:
                            self._stalls.note(free[at], arrival)
                    yield at, wave
                    free[at] = self.pool.devices[at].mark_compute()
                    for _, slot in wave:
                        self.pool.used(slot, free[at])

    def stacks(self, at: int) -> dict[str, Tensor]:
        """All slots of a device as parameters `[C, ..]` by name."""
        if not self._stacks:
            self._stacks = [stack_slots(memory, self.layout) for memory in self.pool.memory]
        return self._stacks[at]

    def close(self) -> None:
        super().close()
        self._stacks.clear()
        self._known = self._hidden = self.host = None

    def _await(self, slot: int) -> Arrival | None:
        """What is launched from now on finds the slot's bytes there. Returns their arrival if this is its first use."""
        arrival = self.pool.arrival(slot)
        if arrival is not None:
            self.pool.arrived(slot)
            if not arrival.end.done():
                self.pool.devices[self.pool.device_of(slot)].compute_wait(arrival.end)
        return arrival

    def _split(self, ready: Wave) -> Iterator[tuple[int, Wave]]:
        """What is there together, device by device; what is on its way one by one."""
        there = [pair for pair in ready if not self.apart and self.pool.has_arrived(pair[1])]
        for at in range(len(self.pool.devices)):
            wave = sorted((pair for pair in there if self.pool.device_of(pair[1]) == at), key=lambda pair: pair[1])
            if wave:
                yield at, wave
        taken = set(there)
        for pair in ready:
            if pair not in taken:
                yield self.pool.device_of(pair[1]), [pair]


def run_waves(
    layer: DeviceExpertLayer, module: Any, hidden: Tensor, index: Tensor, weights: Tensor, accumulator: Accumulator
) -> Tensor:
    """`compute_as_ready` on devices: the same matmuls on the same rows, added up in the same order."""
    dtype = {"hidden": hidden.dtype, "weights": weights.dtype, "float32": torch.float32}[accumulator]
    output = torch.zeros_like(hidden, dtype=dtype)  # [T, D]
    rows = group_rows(layer.ids(index), layer.layout.experts)
    if not rows:
        return output.to(hidden.dtype)
    home, devices = layer.pool.devices[0], layer.pool.devices
    sizes = [len(k) for k, _ in rows.values()]
    both = home.upload(torch.stack([torch.cat(part) for part in zip(*rows.values(), strict=True)]))  # [2, n]
    pairs = dict(zip(rows, zip(*(part.split(sizes) for part in both), strict=True), strict=True))
    order = iter(rows)
    turn = next(order, None)
    early: dict[int, Tensor] = {}  # computed before their turn
    aside = layer.aside(module, {expert: t.tolist() for expert, (_, t) in rows.items()})
    with closing(layer.waves(tuple(rows), aside)) as waves:  # type: ignore[type-var] # a generator
        for at, wave in waves:
            for expert, slot in wave:
                k, t = pairs[expert]
                x = hidden[t].to(devices[at].torch_device)
                result = apply_expert(module, layer.parameters(expert, slot), x).to(layer.device)
                early[expert] = (result * weights[t, k, None]).to(dtype)
            while turn in early:
                output.index_add_(0, pairs[turn][1], early.pop(turn))
                turn = next(order, None)
    for expert, computed in aside.results() if aside is not None else ():
        k, t = pairs[expert]
        early[expert] = (home.upload(computed) * weights[t, k, None]).to(dtype)
    while turn in early:
        output.index_add_(0, pairs[turn][1], early.pop(turn))
        turn = next(order, None)
    return output.to(hidden.dtype)


def run_grouped(layer: DeviceExpertLayer, module: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """What transformers' `grouped_mm` does with all experts in memory, in waves."""
    tokens, active = index.shape
    rows = rows_of_experts(layer.ids(index), layer.layout.experts)
    if not rows:
        return torch.zeros_like(hidden)
    home, scale = layer.pool.devices[0], weights.reshape(-1)
    parts: Tensor | None = None  # [T * K, D]
    aside = layer.aside(module, {expert: [pair // active for pair in own] for expert, own in rows.items()})
    with closing(layer.waves(tuple(rows), aside)) as waves:  # type: ignore[type-var] # a generator
        for at, wave in waves:
            there, start = layer.pool.devices[at].torch_device, layer.pool.starts[at]
            for span in windows([slot for _, slot in wave]):
                members = [(slot - start, rows[expert]) for expert, slot in wave[span]]
                pairs, which, groups = plan_groups(members, active, home.upload)
                result = apply_experts(module, layer.stacks(at), hidden[which].to(there), groups.to(there))
                result = result.to(layer.device) * scale[pairs, None]
                if parts is None:
                    parts = result.new_zeros(tokens * active, result.shape[1])
                parts.index_copy_(0, pairs, result)
    for expert, computed in aside.results() if aside is not None else ():
        pairs = home.upload(torch.tensor(rows[expert]))
        result = home.upload(computed) * scale[pairs, None]
        if parts is None:
            parts = result.new_zeros(tokens * active, result.shape[1])
        parts.index_copy_(0, pairs, result)
    assert parts is not None
    return parts.view(tokens, active, -1).sum(1).to(hidden.dtype)


def agrees(layer: DeviceExpertLayer, module: nn.Module, width: int, dtype: torch.dtype) -> bool | None:
    """Whether grouped matmuls give the same bits however the experts come in, tried on the module's own weights.

    Returns:
        `None` where they can't run these experts, or are off by more than rounding.
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
            plain = run_waves(layer, module, hidden, index, weights, layer.accumulator).float()
            try:
                together = run_grouped(layer, module, hidden, index, weights)
                layer.apart = True
                apart = run_grouped(layer, module, hidden, index, weights)
            except (RuntimeError, ValueError, KeyError, AttributeError):  # not of a shape or dtype that they can take
                return None
            finally:
                layer.apart = False
            error = (together.float() - plain).norm() / plain.norm().clamp_min(1e-12)
            if not error < 0.05:  # a rounding of bfloat16 is 0.004
                return None
            same = same and torch.equal(together, apart)
    return same
