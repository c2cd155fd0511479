"""One load under way: experts are left on `meta`, and each experts module gets a handle on the pool instead.

The seams are transformers' own: its registry of experts functions, and the one function of its loader that turns a
checkpoint's tensors into parameters, which is wrapped for the duration of a load to keep experts from it (`divert`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, modeling_utils

from finemoe.checkpoint import Checkpoint, ExpertIndex, TensorHeader
from finemoe.checkpoint.weight_conversion import ExpertsModule, read_expert_index
from finemoe.config import LoadConfig, format_bytes
from finemoe.engine.assembly import make_engine
from finemoe.engine.async_policy import AsyncPolicy
from finemoe.engine.engine import Engine
from finemoe.engine.expert_layer import HANDLE, Accumulator, ExpertLayer, Kernel, LazyParameter, Views, choose_path
from finemoe.errors import BudgetError, CheckpointError
from finemoe.gpu.copier import HostToDeviceCopier
from finemoe.gpu.device import Device
from finemoe.gpu.expert_layer import DeviceExpertLayer
from finemoe.gpu.setup import DeviceReader, Tiers, choose_kernel
from finemoe.gpu.slot_pool import DeviceSlotPool
from finemoe.learned import MapPersistence
from finemoe.model.handle import ModelHandle, OffloadedModel
from finemoe.model.introspect import find_experts, parameter_dtypes, pool_slots
from finemoe.model.observer import Observer
from finemoe.model.quantized import refuse_on_devices, refuse_unasked, refuse_uncast, restored_bytes
from finemoe.policy import make_cache_manager
from finemoe.store import DiskStore, RamSlotPool
from finemoe.store.dense import LazyTensor
from finemoe.store.quantization import Dequantizer, scratch_bytes
from finemoe.store.quantized_copy import planned_copy
from finemoe.store.reader import ReaderThreads
from finemoe.store.verify import SecondReader
from finemoe.system import available_bytes
from finemoe.types import ExpertId


class Loading:
    """What a load has set up so far.

    Args:
        config: what was asked for.
        checkpoint: the model's files.
        model_config: transformers' own.
        headers: of all tensors in the files.
        devices: that the model runs on; none for the CPU.
    """

    def __init__(
        self,
        config: LoadConfig,
        checkpoint: Checkpoint,
        model_config: PreTrainedConfig,
        headers: dict[str, TensorHeader],
        devices: Sequence[Device],
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._model_config = model_config
        self._headers = headers
        self.options: dict[str, Any] = {}  # of the policy
        self.keeper: MapPersistence | None = None  # of its maps
        self.fingerprint: str | None = None  # of the model, where the policy learns
        self._experts: list[tuple[ExpertsModule, nn.Module]] = []
        self._expert_index: ExpertIndex | None = None
        self._opened: list[DiskStore] = []
        self._files = checkpoint.files  # that experts are read from
        self._store: DiskStore | None = None  # over these
        self._devices = devices
        self._tiers: Tiers | None = None  # where there are devices
        self._pool: RamSlotPool | DeviceSlotPool | None = None
        self._transfer: ReaderThreads | HostToDeviceCopier | None = None
        self._beside: AsyncPolicy | None = None  # the policy, where it has a thread

    def convert_and_load(self, original: Callable[..., Any], model: PreTrainedModel, load_config: Any) -> Any:
        """In place of transformers' function: keeps experts from it, and gives it slices that read directly."""
        refuse_unasked(load_config.hf_quantizer)
        self._experts = find_experts(model)
        modules = [described for described, _ in self._experts]
        routed = {f"{module.name}.{name}" for module in modules for name in module.parameters}
        dense, expert_index = read_expert_index(model, modules, self._headers, load_config.weight_mapping or [])
        copy = planned_copy(self._checkpoint, self._headers, expert_index, self._config.expert_dtype)
        self._expert_index = expert_index if copy is None else copy.expert_index
        slot_bytes = self._expert_index.slot_bytes
        if self._devices:
            refuse_on_devices(self._expert_index)
            owners = {module.name: module for module in modules}
            dtypes = [parameter_dtypes(owners[layout.module]) for layout in self._expert_index.layouts]
            self._tiers = Tiers(self._devices, self._expert_index, dtypes)
            slot_bytes = self._tiers.slot_bytes
        slots, least = pool_slots(self._expert_index, self._model_config, self._config.expert_memory, slot_bytes)
        dense_bytes = restored_bytes((self._headers[key] for key in dense), model.dtype)
        dense_bytes += scratch_bytes(self._expert_index.layouts, model.dtype)
        needed, available = dense_bytes + (0 if self._devices else slots * slot_bytes), available_bytes()
        if needed > available:
            raise BudgetError(
                f"--expert-memory: {slots} experts and the dense part take {format_bytes(needed)}, but only "
                f"{format_bytes(available)} of memory are available; give a smaller budget"
            )
        self._store = dense_store = self._open(self._checkpoint.files, expert_index)
        if copy is not None:
            copy.write(dense_store)
            self._files, self._store = copy.files, self._open(copy.files, copy.expert_index)
        if self._tiers is None:
            self._pool = RamSlotPool(slots, slot_bytes)
        else:
            self._pool = self._tiers.allocate(slots, least, dense_bytes, self._config.host_memory)
        for module in modules:
            for parameter in module.parameters.values():
                parameter._is_hf_initialized = True  # type: ignore[attr-defined] # nothing to fill in
        state = {key: LazyTensor(dense_store, key, self._headers[key]) for key in dense}
        planned = {name: parameter.dtype for name, parameter in model.named_parameters()}
        info, index = original(model=model, state_dict=state, load_config=load_config, disk_offload_index=None)
        if load_config.hf_quantizer is not None and self._config.dtype != "auto":
            refuse_uncast(model, planned)
        if dense_store is not self._store:
            dense_store.close()
        info.missing_keys -= routed
        return info, index

    def _open(self, files: Sequence[Path], expert_index: ExpertIndex) -> DiskStore:
        try:
            store = DiskStore(files, expert_index, self._config.io)
        except OSError as error:
            raise CheckpointError(
                f"{error.filename}: can't be opened for --io {self._config.io} ({error.strerror})"
            ) from error
        self._opened.append(store)
        return store

    def finish(self, model: PreTrainedModel) -> Any:
        """Swap the experts' weights for handles on the pool."""
        offloaded: Any = model
        assert self._expert_index is not None and self._store is not None and self._pool is not None
        # requires_grad stays as transformers set it: torch's matmul picks its kernel, and so its rounding, by it
        sizes = [layout.experts for layout in self._expert_index.layouts]
        shape = len(sizes), max(sizes)
        self._transfer = self._connect(self._store)
        verify = self._verifier() if self._config.verify else None
        # experts are tried under another controller: what the policy learns is what the model does
        spread = max(1, len(self._devices))
        trial = Engine(
            self._pool, make_cache_manager("lru", *shape, self._pool.slots, devices=spread), self._transfer, verify
        )
        lock = threading.RLock()
        layers = self._swap(self._expert_index, trial, lock)
        handles = list(layers.values())
        if self._devices:
            offloaded.to(self._devices[0].torch_device)
        self._choose_paths(handles, model.dtype)
        if self._tiers is not None and self._config.host_compute == "auto":
            self._tiers.help_out(handles, [module for _, module in self._experts], model.dtype)
        trial.clear()
        engine = make_engine(
            self._config, self.options, self.keeper, self._pool, self._transfer, self._expert_index,
            verify=verify, devices=spread,
        )  # fmt: skip
        policy = engine.cache_manager.policy
        self._beside = policy if isinstance(policy, AsyncPolicy) else None
        if self._tiers is not None:
            self._tiers.follow(engine)
        for handle in handles:
            handle.engine = engine
        seen = policy.needs | policy.uses
        ahead = policy.lookahead if "lookahead" in seen else 0
        observer = Observer(model, engine, layers, lookahead=ahead) if seen else None
        if observer is not None:
            observer.attach(model)
        parts = self._checkpoint, self._expert_index, self._store, engine, handles, lock, self._config
        offload = ModelHandle(
            *parts, keeper=self.keeper, observer=observer, tiers=self._tiers, fingerprint=self.fingerprint
        )
        if isinstance(self._pool, RamSlotPool):
            self._pool.wait_prefaulted()
        offload.reset_stats()
        kind = type(model)
        members = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        offloaded.__class__ = type(kind.__name__, (OffloadedModel, kind), members)
        offloaded.finemoe = offload
        weakref.finalize(model, offload.close)
        return offloaded

    def _connect(self, store: DiskStore) -> ReaderThreads | HostToDeviceCopier:
        threads, bandwidth_bytes_s = self._config.reader_threads, self._config.link_bandwidth_bytes_s
        if self._tiers is not None:
            return self._tiers.connect(store, threads)
        return ReaderThreads(store, threads, bandwidth_bytes_s=bandwidth_bytes_s)

    def _swap(self, expert_index: ExpertIndex, engine: Engine, lock: threading.RLock) -> dict[str, ExpertLayer]:
        """A handle in the place of each experts module's weights; by the module's path."""
        numbers = {layout.module: layer for layer, layout in enumerate(expert_index.layouts)}
        layers: dict[str, ExpertLayer] = {}
        dequantizer, views = Dequantizer(), Views()
        for described, module in self._experts:
            dtypes = parameter_dtypes(described)
            layer = numbers[described.same_as or described.name]
            if self._tiers is None:
                handle = ExpertLayer(engine, lock, layer, expert_index.layouts[layer], dtypes, dequantizer, views)
            else:
                handle = self._tiers.layer(engine, lock, layer, dtypes, views)
            for name, parameter in described.parameters.items():
                delattr(module, name)
                module.__dict__[name] = LazyParameter(handle, name, parameter)
            module.__dict__[HANDLE] = handle
            layers[described.name] = handle
        return layers

    def undo(self) -> None:
        """Free whatever a failed load has taken."""
        if self._tiers is not None:
            self._tiers.close()
        if self._beside is not None:
            self._beside.close()
        if self._transfer is not None:
            self._transfer.close()
        if self._pool is not None:
            self._pool.close()
        for store in self._opened:
            store.close()

    def _choose_paths(self, layers: list[ExpertLayer], dtype: torch.dtype) -> None:
        """Try the fast path against the twin once for each kind of experts module."""
        chosen: dict[Any, tuple[Accumulator | None, Kernel]] = {}
        for handle, (described, module) in zip(layers, self._experts, strict=True):
            up = described.parameters.get("gate_up_proj", described.parameters.get("up_proj"))
            if up is None:
                continue
            kind = type(module), tuple((n, p.shape, p.dtype) for n, p in described.parameters.items())
            if kind not in chosen:
                width = up.shape[1] if getattr(module, "is_transposed", False) else up.shape[-1]
                kernel: Kernel = "eager"
                handle.accumulator = choose_path(handle, module, width, dtype)
                if isinstance(handle, DeviceExpertLayer):
                    kernel = choose_kernel(handle, module, width, dtype, self._config.expert_kernel)
                chosen[kind] = handle.accumulator, kernel
            handle.accumulator, kernel = chosen[kind]
            if isinstance(handle, DeviceExpertLayer):
                handle.kernel = kernel

    def _verifier(self) -> Callable[[ExpertId, int], None]:
        assert self._expert_index is not None and self._pool is not None
        if self._tiers is not None:
            return DeviceReader(self._tiers, self._expert_index, self._files).check
        assert isinstance(self._pool, RamSlotPool)
        return SecondReader(self._files, self._expert_index, self._pool).check


_LOADING = threading.Lock()  # it is wrapped by one load at a time


@contextmanager
def diverted(replacement: Callable[..., Any]) -> Iterator[None]:
    """Wraps transformers' function that turns a checkpoint's tensors into parameters, for the time of a load."""
    with _LOADING:
        original = modeling_utils.convert_and_load_state_dict_in_model
        loading = threading.get_ident()

        def wrapped(model: PreTrainedModel, state_dict: Any, load_config: Any, disk_offload_index: Any = None) -> Any:
            if threading.get_ident() != loading:  # someone else's load, of a model of their own
                return original(model, state_dict, load_config, disk_offload_index)
            return replacement(original, model, load_config)

        modeling_utils.convert_and_load_state_dict_in_model = wrapped
        try:
            yield
        finally:
            modeling_utils.convert_and_load_state_dict_in_model = original
