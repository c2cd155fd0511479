"""A model on devices: its tiers, from the disk by way of pinned host memory to slots on GPUs."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finemoe.checkpoint import ExpertIndex, LayerLayout
from finemoe.checkpoint.expert_index import PAGE_BYTES, PLACED_BYTES, round_up
from finemoe.config import format_bytes, parse_budget
from finemoe.engine.engine import Engine
from finemoe.engine.expert_layer import ExpertLayer, Kernel, Views, field_views
from finemoe.errors import BudgetError, ConfigError, InvariantError
from finemoe.gpu.copier import HostToDeviceCopier
from finemoe.gpu.copy_queue import CopyPiece
from finemoe.gpu.device import Device
from finemoe.gpu.expert_layer import DeviceExpertLayer, Touched, agrees
from finemoe.gpu.host_tier import HostTier
from finemoe.gpu.hybrid_cpu import HostCompute, measure
from finemoe.gpu.slot_pool import DeviceSlotPool, Stalls
from finemoe.metrics import Counters
from finemoe.store import DiskStore
from finemoe.store.reader import ReaderThreads
from finemoe.system import available_bytes
from finemoe.types import ExpertId

HOST_SHARE = 0.8  # of the available memory, at most, where --host-memory is not given
ALIGN_BYTES = 256  # of a parameter in a slot: what torch's allocator gives on a GPU, and kernels are chosen by
LEAST_SLOTS = 2  # of a device: one is computed while one comes in
Dtypes = dict[str, torch.dtype]


def arranged(layout: LayerLayout, dtypes: Dtypes) -> LayerLayout:
    """How an expert lies in a device's slot: every parameter as the module wants it, none to be restored on use."""
    end, fields, offsets = 0, [], []
    for field in layout.fields:
        dtype = dtypes[field.name]
        length = int(torch.Size(field.shape).numel()) * dtype.itemsize
        plain = {"stored_shape": field.shape, "dtype": dtype, "length_bytes": length}
        fields.append(replace(field, transposed=False, order=None, **plain))  # type: ignore[arg-type] # by name
        offsets.append(round_up(end, ALIGN_BYTES))
        end = offsets[-1] + length
    everyone = (tuple(offsets),) * layout.experts
    return replace(layout, fields=tuple(fields), offsets_bytes=everyone, length_bytes=end)


def arrange(raw: Tensor, expert: int, stored: LayerLayout, wanted: LayerLayout) -> None:
    """Turns one expert's bytes, as the checkpoint has them, into those of a device's slot. In place."""
    views = field_views(raw, stored.fields, stored.offsets_bytes[expert])
    pairs = zip(stored.fields, wanted.fields, strict=True)
    made = [f.restore(views[f.name]).to(w.dtype).clone(memory_format=torch.contiguous_format) for f, w in pairs]
    for field, begin, value in zip(wanted.fields, wanted.offsets_bytes[expert], made, strict=True):
        raw[begin : begin + field.length_bytes] = value.reshape(-1).view(torch.uint8)


class Tiers:
    """Where the experts of one model are, and the way between.

    Args:
        devices: that have the slots; the dense part is on the first.
        catalog: the experts as the checkpoint has them.
        dtypes: of each MoE layer's parameters, by name.
    """

    def __init__(self, devices: Sequence[Device], expert_index: ExpertIndex, dtypes: Sequence[Dtypes]) -> None:
        self.devices = devices
        self._expert_index = expert_index
        self.layouts = tuple(arranged(layout, own) for layout, own in zip(expert_index.layouts, dtypes, strict=True))
        largest = max(layout.length_bytes for layout in self.layouts)
        self.slot_bytes = round_up(largest, PAGE_BYTES if largest >= PLACED_BYTES else ALIGN_BYTES)
        self._host_slot_bytes = max(self.slot_bytes, expert_index.slot_bytes)  # read in one form, kept in the other
        self._as_stored = all(map(_same, expert_index.layouts, self.layouts))  # but for its place
        self._most = max(layout.experts for layout in self.layouts)
        self.host_slots = 0
        self._host_compute: HostCompute | None = None
        self.pool: DeviceSlotPool | None = None
        self.link: HostToDeviceCopier | None = None
        self.stalls, self.touched = Stalls(Counters()), Touched(Counters())
        self._firsts: tuple[int, ...] | None = None  # slots of each layer's expert 0, where all experts have one

    def allocate(self, slots: int, least: int, dense_bytes: int, host_memory: str | None) -> DeviceSlotPool:
        """The slots on the devices; refuses a host tier that the machine can't have before anything is read.

        Args:
            slots: on all devices together.
            least: slots that a step needs.
            dense_bytes: of the rest of the model.
            host_memory: as the user gave it.

        Raises:
            BudgetError: too much, or too little; the message names the flag.
        """
        if slots < (few := len(self.devices) * LEAST_SLOTS):
            raise BudgetError(
                f"--expert-memory: {slots} experts on {len(self.devices)} devices; at least {few} are needed, "
                f"{format_bytes(few * self.slot_bytes)}"
            )
        first, own = self.devices[0], -(-slots // len(self.devices)) * self.slot_bytes
        if own + dense_bytes > first.available_bytes():
            raise BudgetError(
                f"--expert-memory: {format_bytes(own)} of experts and the dense part ({format_bytes(dense_bytes)}) do "
                f"not fit on {first.torch_device}, where {format_bytes(first.available_bytes())} are available; give a "
                "smaller budget"
            )
        self.host_slots = self._count_host_slots(least, dense_bytes, host_memory)
        every = slots == self._expert_index.experts and len(self.devices) == 1
        self._firsts = tuple(accumulate((layout.experts for layout in self.layouts), initial=0)) if every else None
        self.pool = DeviceSlotPool(self.devices, slots, self.slot_bytes, self.home, self._own if every else None)
        return self.pool

    def _own(self, expert: ExpertId) -> int:
        assert self._firsts is not None
        return self._firsts[expert.layer] + expert.expert

    @property
    def host_memory_bytes(self) -> int:
        return self.host_slots * self._host_slot_bytes

    def home(self, expert: ExpertId) -> int:
        """The device that an expert lives on: round-robin, as the controller has it."""
        return (expert.layer * self._most + expert.expert) % len(self.devices)

    def connect(self, store: DiskStore, threads: int) -> HostToDeviceCopier:
        """The host tier, and the link over it."""
        experts = [ExpertId(layer, e) for layer, layout in enumerate(self.layouts) for e in range(layout.experts)]
        host = HostTier(experts, self.host_slots, self._host_slot_bytes, self.devices)
        readers = ReaderThreads(store, threads, prefetch_threads=threads)  # nothing else needs the cores
        self.link = HostToDeviceCopier(
            host, readers, self.devices, self.pieces, None if self._as_stored else self._arrange
        )
        return self.link

    def help_out(self, layers: Sequence[ExpertLayer], modules: Sequence[Any], dtype: torch.dtype) -> None:
        """Let the host compute what misses where that is faster. Not for modules with weights that experts share."""
        assert self.link is not None
        able = [pair for pair in zip(layers, modules, strict=True) if _computes_anywhere(*pair)]
        if not able:
            return
        layer, module = able[0]
        first = ExpertId(layer.layer, 0)
        up = next(f for f in self.layouts[layer.layer].fields if f.name in {"gate_up_proj", "up_proj"})
        x = torch.zeros(1, up.shape[0] if module.is_transposed else up.shape[-1], dtype=dtype)
        costs = measure(self.devices[0], module, lambda raw: self.host_views(first, raw), self._host_slot_bytes, x)
        self._host_compute = HostCompute(self.link, self.host_views, costs)
        for layer, _ in able:
            assert isinstance(layer, DeviceExpertLayer)
            layer.host = self._host_compute

    def host_views(self, expert: ExpertId, raw: Tensor) -> dict[str, Tensor]:
        """An expert's parameters as the module wants them, out of its bytes in the host tier. Shared, not copied."""
        wanted = self.layouts[expert.layer]
        kept = self._expert_index.layouts[expert.layer] if self._as_stored else wanted
        return field_views(raw, wanted.fields, kept.offsets_bytes[expert.expert])

    def close(self) -> None:
        """End what is not closed with the link."""
        if self._host_compute is not None:
            self._host_compute.close()

    def follow(self, engine: Engine) -> None:
        """From now on this engine serves: its counters tell of stalls, its policy what the host tier keeps."""
        assert self.link is not None
        retention_priority = engine.cache_manager.policy.retention_priority
        self.link.host.rank = lambda expert: float(retention_priority[expert])
        if self._firsts is not None:  # there is room for all
            engine.preload([ExpertId(n, e) for n, layout in enumerate(self.layouts) for e in range(layout.experts)])
        self.stalls.drop()
        self.stalls.counters = self.touched.counters = engine.counters

    def settle(self) -> None:
        """Count what devices did and the host has not heard of yet. Waits for them."""
        self.stalls.settle(wait=True)
        self.touched.settle()

    def layer(
        self, engine: Engine, lock: threading.RLock, layer: int, dtypes: Dtypes, views: Views
    ) -> DeviceExpertLayer:
        """A handle for an experts module."""
        assert self.pool is not None
        layout = self.layouts[layer]
        handle = DeviceExpertLayer(
            engine, lock, layer, layout, dtypes, self.pool, stalls=self.stalls, touched=self.touched, views=views
        )
        handle.first = None if self._firsts is None else self._firsts[layer]
        return handle

    def pieces(self, expert: ExpertId) -> list[CopyPiece]:
        """Where an expert's parameters lie in a slot of the host tier, and where in one of a device."""
        wanted = self.layouts[expert.layer]
        kept = self._expert_index.layouts[expert.layer] if self._as_stored else wanted
        sources, targets = kept.offsets_bytes[expert.expert], wanted.offsets_bytes[expert.expert]
        lengths = [field.length_bytes for field in wanted.fields]
        return [CopyPiece(*piece) for piece in zip(sources, targets, lengths, strict=True)]

    def _arrange(self, expert: ExpertId, raw: Tensor) -> None:
        arrange(raw, expert.expert, self._expert_index.layouts[expert.layer], self.layouts[expert.layer])

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


class DeviceReader:
    """The slow plain twin of the way to a device, for debug runs."""

    def __init__(self, tiers: Tiers, expert_index: ExpertIndex, files: Sequence[Path]) -> None:
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
        for run in self._expert_index.byte_ranges(expert):
            with self._files[run.file].open("rb") as file:
                file.seek(run.file_offset_bytes)
                piece = bytearray(file.read(run.length_bytes))
            end = run.slot_offset_bytes + run.length_bytes
            raw[run.slot_offset_bytes : end] = torch.frombuffer(piece, dtype=torch.uint8)
        stored, wanted = self._expert_index.layouts[expert.layer], self._tiers.layouts[expert.layer]
        arrange(raw, expert.expert, stored, wanted)
        held = pool.bytes_of(slot).cpu()
        for field, begin in zip(wanted.fields, wanted.offsets_bytes[expert.expert], strict=True):
            span = slice(begin, begin + field.length_bytes)
            if not torch.equal(raw[span], held[span]):
                raise InvariantError(
                    f"slot {slot} does not hold {expert}: its {field.name} differs from the checkpoint"
                )


def choose_kernel(
    layer: DeviceExpertLayer, module: nn.Module, width: int, dtype: torch.dtype, wanted: Literal["auto"] | Kernel
) -> Kernel:
    """Whose arithmetic an experts module runs with, by `--expert-kernel`.

    Raises:
        ConfigError: grouped matmuls were asked for, and can't run it.
    """
    if layer.accumulator is None and len(layer.pool.devices) > 1:
        raise ConfigError("--device: this model's experts run by their own code, on one device; name one alone")
    if wanted == "eager" or (wanted == "auto" and dtype != torch.bfloat16):  # the kernel's own dtype; others are slow
        return "eager"
    same = agrees(layer, module, width, dtype) if layer.accumulator is not None else None
    if wanted == "grouped_mm" and same is None:
        raise ConfigError(
            "--expert-kernel: grouped_mm can't compute this model's experts on this device; give auto or eager"
        )
    return "grouped_mm" if same or wanted == "grouped_mm" else "eager"


def _computes_anywhere(layer: ExpertLayer, module: Any) -> bool:
    """Whether all that an experts module computes with is in its experts' slots."""
    own = [*module.parameters(), *module.buffers()]
    return layer.accumulator is not None and not own


def _same(stored: LayerLayout, wanted: LayerLayout) -> bool:
    """Whether the checkpoint's parameters are those of the device's slot, byte for byte."""
    return all(s.in_place and s.dtype == w.dtype for s, w in zip(stored.fields, wanted.fields, strict=True))
