"""Builds a model's memory tiers on devices at load (disk, pinned host memory, device slots); chooses its kernel."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finemoe.budget import format_bytes, parse_budget
from finemoe.checkpoint import ExpertIndex, LayerLayout
from finemoe.checkpoint.expert_index import PAGE_BYTES, PLACED_BYTES, round_up
from finemoe.engine.engine import Engine
from finemoe.engine.expert_layer import ExpertLayer, Kernel, Views, field_views
from finemoe.errors import BudgetError, ConfigError, InvariantError
from finemoe.gpu.copier import HostToDeviceCopier
from finemoe.gpu.copy_queue import CopyPiece
from finemoe.gpu.counters import DeviceHitCounter, StallCounter
from finemoe.gpu.device import Device
from finemoe.gpu.expert_layer import DeviceExpertLayer, grouped_is_exact
from finemoe.gpu.host_tier import HostTier
from finemoe.gpu.hybrid_cpu import HostCompute, measure_costs
from finemoe.gpu.slot_pool import DeviceSlotPool
from finemoe.metrics import Counters
from finemoe.store import DiskStore
from finemoe.store.reader_threads import ReaderThreads
from finemoe.system import available_bytes
from finemoe.types import ExpertId

HOST_SHARE = 0.8  # of the available memory, at most, without --host-memory
ALIGN_BYTES = 256  # of a parameter in a slot, as torch's allocator aligns on a GPU: kernels are chosen by alignment
MIN_SLOTS = 2  # per device: one is computed while the other is copied to
Dtypes = dict[str, torch.dtype]


class DeviceTiers:
    """The memory tiers of one model on devices, in the order of a load: `allocate`, `make_copier`, `make_layer`.

    Args:
        devices: the devices that have the slots; the dense weights are on the first.
        expert_index: of the checkpoint.
        dtypes: of each MoE layer's parameters, by name.

    Attributes:
        layouts: of an expert's parameters in a device's slot, for each MoE layer.
    """

    def __init__(self, devices: Sequence[Device], expert_index: ExpertIndex, dtypes: Sequence[Dtypes]) -> None:
        self.devices = devices
        self.layouts = tuple(
            device_layout(layout, own) for layout, own in zip(expert_index.layouts, dtypes, strict=True)
        )
        largest = max(layout.length_bytes for layout in self.layouts)
        self.slot_bytes = round_up(largest, PAGE_BYTES if largest >= PLACED_BYTES else ALIGN_BYTES)
        self.host_slots = 0
        self.pool: DeviceSlotPool | None = None
        self.copier: HostToDeviceCopier | None = None
        self._expert_index = expert_index
        # read in the checkpoint's layout, then converted in place
        self._host_slot_bytes = max(self.slot_bytes, expert_index.slot_bytes)
        self._as_stored = all(map(_differ_only_in_offsets, expert_index.layouts, self.layouts))
        self._max_experts = max(layout.experts for layout in self.layouts)
        self._host_compute: HostCompute | None = None
        self._stalls, self._hits = StallCounter(Counters()), DeviceHitCounter(Counters())
        self._first_slots: tuple[int, ...] | None = None  # of each layer's expert 0, if every expert has its own slot

    @property
    def host_memory_bytes(self) -> int:
        return self.host_slots * self._host_slot_bytes

    def allocate(self, slots: int, min_host_slots: int, dense_bytes: int, host_memory: str | None) -> DeviceSlotPool:
        """Allocates the slots on the devices, and checks the host tier's size before anything is read.

        Args:
            slots: on all devices together.
            min_host_slots: experts that one step of the model needs.
            dense_bytes: of the dense weights.
            host_memory: as given by the user.

        Raises:
            BudgetError: too much or too little memory; the message names the flag.
        """
        if slots < (least := len(self.devices) * MIN_SLOTS):
            raise BudgetError(
                f"--expert-memory: {slots} experts on {len(self.devices)} devices; at least {least} are needed, "
                f"{format_bytes(least * self.slot_bytes)}"
            )
        first, own = self.devices[0], -(-slots // len(self.devices)) * self.slot_bytes
        if own + dense_bytes > first.available_bytes():
            raise BudgetError(
                f"--expert-memory: {format_bytes(own)} of experts and the dense part ({format_bytes(dense_bytes)}) do "
                f"not fit on {first.torch_device}, where {format_bytes(first.available_bytes())} are available; give a "
                "smaller budget"
            )
        self.host_slots = self._count_host_slots(min_host_slots, dense_bytes, host_memory)
        all_fit = slots == self._expert_index.experts and len(self.devices) == 1
        first_slots = tuple(accumulate((layout.experts for layout in self.layouts), initial=0))
        self._first_slots = first_slots if all_fit else None
        self.pool = DeviceSlotPool(
            self.devices, slots, self.slot_bytes, self._device_of, self._fixed_slot if all_fit else None
        )
        return self.pool

    def make_copier(self, store: DiskStore, threads: int) -> HostToDeviceCopier:
        """The host tier, reader threads that fill it, and the copier from it to the devices."""
        experts = [ExpertId(layer, e) for layer, layout in enumerate(self.layouts) for e in range(layout.experts)]
        host = HostTier(experts, self.host_slots, self._host_slot_bytes, self.devices)
        readers = ReaderThreads(store, threads, prefetch_threads=threads)  # nothing else needs the cores
        convert = None if self._as_stored else self._convert
        self.copier = HostToDeviceCopier(host, readers, self.devices, self._pieces, convert)
        return self.copier

    def make_layer(
        self, engine: Engine, lock: threading.RLock, layer: int, dtypes: Dtypes, views: Views
    ) -> DeviceExpertLayer:
        """The handle of an experts module."""
        assert self.pool is not None
        layout = self.layouts[layer]
        made = DeviceExpertLayer(
            engine, lock, layer, layout, dtypes, self.pool, stalls=self._stalls, hits=self._hits, views=views
        )
        made.first_slot = None if self._first_slots is None else self._first_slots[layer]
        return made

    def enable_host_compute(self, layers: Sequence[ExpertLayer], modules: Sequence[Any], dtype: torch.dtype) -> None:
        """Measures the costs of `--host-compute auto`, and enables it for all layers that can be computed on the host.

        Args:
            layers: made by `make_layer`.
            modules: their experts modules.
            dtype: of hidden states.
        """
        assert self.copier is not None
        able = [pair for pair in zip(layers, modules, strict=True) if _runs_on_host(*pair)]
        if not able:
            return
        layer, module = able[0]
        first = ExpertId(layer.layer, 0)
        up = next(f for f in self.layouts[layer.layer].fields if f.name in {"gate_up_proj", "up_proj"})
        x = torch.zeros(1, up.shape[0] if module.is_transposed else up.shape[-1], dtype=dtype)
        costs = measure_costs(
            self.devices[0], module, lambda raw: self._host_views(first, raw), self._host_slot_bytes, x
        )
        self._host_compute = HostCompute(self.copier, self._host_views, costs)
        for layer, _ in able:
            assert isinstance(layer, DeviceExpertLayer)
            layer.host_compute = self._host_compute

    def attach_engine(self, engine: Engine) -> None:
        """From now on counts into this engine's counters, and evicts from the host tier by its policy's priorities."""
        assert self.copier is not None
        retention_priority = engine.cache_manager.policy.retention_priority
        self.copier.host.priority = lambda expert: float(retention_priority[expert])
        if self._first_slots is not None:  # all experts fit
            engine.preload([ExpertId(n, e) for n, layout in enumerate(self.layouts) for e in range(layout.experts)])
        self._stalls.reset()
        self._stalls.counters = self._hits.counters = engine.counters

    def collect_counters(self) -> None:
        """Adds what the devices have counted to the engine's counters. Waits for the devices."""
        self._stalls.collect(wait=True)
        self._hits.collect()

    def close(self) -> None:
        """Ends the host's compute thread. The host tier is closed by the copier."""
        if self._host_compute is not None:
            self._host_compute.close()

    def _device_of(self, expert: ExpertId) -> int:
        """Round-robin, as in the cache manager."""
        return (expert.layer * self._max_experts + expert.expert) % len(self.devices)

    def _fixed_slot(self, expert: ExpertId) -> int:
        assert self._first_slots is not None
        return self._first_slots[expert.layer] + expert.expert

    def _host_layout(self, layer: int) -> LayerLayout:
        """The layout of experts in the host tier."""
        return self._expert_index.layouts[layer] if self._as_stored else self.layouts[layer]

    def _host_views(self, expert: ExpertId, raw: Tensor) -> dict[str, Tensor]:
        """An expert's parameters as the module takes them, as views of its bytes in the host tier."""
        offsets_bytes = self._host_layout(expert.layer).offsets_bytes[expert.expert]
        return field_views(raw, self.layouts[expert.layer].fields, offsets_bytes)

    def _pieces(self, expert: ExpertId) -> list[CopyPiece]:
        """Where an expert's parameters are in a slot of the host tier, and in a slot of a device."""
        layout = self.layouts[expert.layer]
        sources = self._host_layout(expert.layer).offsets_bytes[expert.expert]
        targets = layout.offsets_bytes[expert.expert]
        lengths = [field.length_bytes for field in layout.fields]
        return [CopyPiece(*piece) for piece in zip(sources, targets, lengths, strict=True)]

    def _convert(self, expert: ExpertId, raw: Tensor) -> None:
        convert_expert(raw, expert.expert, self._expert_index.layouts[expert.layer], self.layouts[expert.layer])

    def _count_host_slots(self, least: int, dense_bytes: int, host_memory: str | None) -> int:
        experts = self._expert_index.experts
        if host_memory is None:
            spare = int((available_bytes() - dense_bytes) * HOST_SHARE)
            slots = min(experts, max(0, spare) // self._host_slot_bytes)
        else:
            slots = parse_budget(host_memory, "--host-memory").slots(self._host_slot_bytes, experts)
        if slots < min(least, experts):
            raise BudgetError(
                f"--host-memory: {host_memory or 'what is available'} holds {slots} of {experts} experts; at least "
                f"{least} are needed: {format_bytes(least * self._host_slot_bytes)}"
            )
        return slots


class DeviceVerifier:
    """`--verify` on devices: reads every loaded expert a second time, and compares it with its slot. Slow."""

    def __init__(self, tiers: DeviceTiers, expert_index: ExpertIndex, files: Sequence[Path]) -> None:
        self._tiers = tiers
        self._expert_index = expert_index
        self._files = tuple(files)

    def check(self, expert: ExpertId, slot: int) -> None:
        """Raises `InvariantError` if the slot does not hold `expert`. Waits for its bytes."""
        pool = self._tiers.pool
        assert pool is not None
        if (arrival := pool.arrival(slot)) is not None:
            arrival.end.wait()
        raw = torch.zeros(max(self._tiers.slot_bytes, self._expert_index.slot_bytes), dtype=torch.uint8)
        for byte_range in self._expert_index.byte_ranges(expert):
            with self._files[byte_range.file].open("rb") as file:
                file.seek(byte_range.file_offset_bytes)
                data = bytearray(file.read(byte_range.length_bytes))
            end = byte_range.slot_offset_bytes + byte_range.length_bytes
            raw[byte_range.slot_offset_bytes : end] = torch.frombuffer(data, dtype=torch.uint8)
        stored, layout = self._expert_index.layouts[expert.layer], self._tiers.layouts[expert.layer]
        convert_expert(raw, expert.expert, stored, layout)
        loaded = pool.bytes_of(slot).cpu()
        for field, begin in zip(layout.fields, layout.offsets_bytes[expert.expert], strict=True):
            span = slice(begin, begin + field.length_bytes)
            if not torch.equal(raw[span], loaded[span]):
                raise InvariantError(
                    f"slot {slot} does not hold {expert}: its {field.name} differs from the checkpoint"
                )


def choose_kernel(
    layer: DeviceExpertLayer, module: nn.Module, width: int, dtype: torch.dtype, requested: Literal["auto"] | Kernel
) -> Kernel:
    """The kernel of an experts module, by `--expert-kernel`.

    Args:
        width: `D` of the module's input.
        dtype: of the hidden states.
        requested: the flag's value.

    Raises:
        ConfigError: the module's own `forward` would need several devices, or `grouped_mm` can't run it.
    """
    if layer.accumulator is None and len(layer.pool.devices) > 1:
        raise ConfigError("--device: this model's experts run by their own code, on one device; name one alone")
    if requested == "eager" or (requested == "auto" and dtype != torch.bfloat16):  # grouped_mm is slow for others
        return "eager"
    exact = grouped_is_exact(layer, module, width, dtype) if layer.accumulator is not None else None
    if requested == "grouped_mm" and exact is None:
        raise ConfigError(
            "--expert-kernel: grouped_mm can't compute this model's experts on this device; give auto or eager"
        )
    return "grouped_mm" if exact or requested == "grouped_mm" else "eager"


def device_layout(layout: LayerLayout, dtypes: Dtypes) -> LayerLayout:
    """The layout of an expert in a device's slot: every parameter as the module takes it, without conversion on use."""
    end, fields, offsets = 0, [], []
    for field in layout.fields:
        dtype = dtypes[field.name]
        length = int(torch.Size(field.shape).numel()) * dtype.itemsize
        plain = {"stored_shape": field.shape, "dtype": dtype, "length_bytes": length}
        fields.append(replace(field, transposed=False, order=None, **plain))  # type: ignore[arg-type] # by name
        offsets.append(round_up(end, ALIGN_BYTES))
        end = offsets[-1] + length
    offsets_bytes = (tuple(offsets),) * layout.experts
    return replace(layout, fields=tuple(fields), offsets_bytes=offsets_bytes, length_bytes=end)


def convert_expert(raw: Tensor, expert: int, stored: LayerLayout, target: LayerLayout) -> None:
    """Converts one expert's bytes from the checkpoint's layout to a device's, in place.

    Args:
        raw: uint8, large enough for both.
        expert: index within the layer.
        stored: layout in the checkpoint.
        target: layout of `device_layout`.
    """
    views = field_views(raw, stored.fields, stored.offsets_bytes[expert])
    pairs = zip(stored.fields, target.fields, strict=True)
    values = [f.restore(views[f.name]).to(t.dtype).clone(memory_format=torch.contiguous_format) for f, t in pairs]
    for field, begin, value in zip(target.fields, target.offsets_bytes[expert], values, strict=True):
        raw[begin : begin + field.length_bytes] = value.reshape(-1).view(torch.uint8)


def _differ_only_in_offsets(stored: LayerLayout, target: LayerLayout) -> bool:
    """Whether each parameter's bytes are the same in both layouts."""
    return all(s.in_place and s.dtype == t.dtype for s, t in zip(stored.fields, target.fields, strict=True))


def _runs_on_host(layer: ExpertLayer, module: Any) -> bool:
    """Whether an experts module has no weights outside its experts' slots, which would be on the device."""
    own = [*module.parameters(), *module.buffers()]
    return layer.accumulator is not None and not own
