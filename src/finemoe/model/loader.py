"""Loads a model: routed experts stay on `meta`, and each experts module is bound to an `ExpertLayer` over the pool.

It hooks into transformers in two places: its registry of experts functions, and the one function of its loader that
turns a checkpoint's tensors into parameters, which is replaced during a load to skip routed experts (`patched_loader`).
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

from finemoe.budget import format_bytes
from finemoe.checkpoint import Checkpoint, ExpertIndex, TensorHeader
from finemoe.checkpoint.weight_conversion import ExpertsModule, read_expert_index
from finemoe.config import LoadConfig
from finemoe.engine.async_policy import AsyncPolicy
from finemoe.engine.engine import Engine
from finemoe.engine.engine_factory import make_engine
from finemoe.engine.expert_layer import (
    HANDLE,
    Accumulator,
    ExpertLayer,
    Kernel,
    LazyParameter,
    Views,
    choose_accumulator,
)
from finemoe.errors import BudgetError, CheckpointError
from finemoe.gpu.copier import HostToDeviceCopier
from finemoe.gpu.device import Device
from finemoe.gpu.expert_layer import DeviceExpertLayer
from finemoe.gpu.setup import DeviceTiers, DeviceVerifier, choose_kernel
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
from finemoe.store.reader_threads import ReaderThreads
from finemoe.store.verify import SecondReader
from finemoe.system import available_bytes
from finemoe.types import ExpertId


class ModelLoader:
    """Loads one model, in this order: `convert_and_load`, called by transformers; `finish`; or `undo` on an error.

    Args:
        config: settings of the load.
        checkpoint: the model's files.
        model_config: transformers' own.
        headers: of all tensors in the files.
        devices: that the model runs on; empty for the CPU.
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
        self.policy_options: dict[str, Any] = {}  # constructor arguments
        self.map_persistence: MapPersistence | None = None  # None: maps are not saved
        self.fingerprint: str | None = None  # of the model, if the policy learns
        self._experts: list[tuple[ExpertsModule, nn.Module]] = []
        self._expert_index: ExpertIndex | None = None
        self._opened: list[DiskStore] = []  # closed by `undo`
        self._files = checkpoint.files  # that experts are read from
        self._store: DiskStore | None = None  # over `_files`
        self._devices = devices
        self._tiers: DeviceTiers | None = None  # None on the CPU
        self._pool: RamSlotPool | DeviceSlotPool | None = None
        self._transfer: ReaderThreads | HostToDeviceCopier | None = None
        self._async_policy: AsyncPolicy | None = None  # None if the policy is synchronous

    def convert_and_load(self, original: Callable[..., Any], model: PreTrainedModel, load_config: Any) -> Any:
        """Replaces transformers' function: passes it the dense tensors only, as slices that read directly.

        Raises:
            BudgetError: the pool and the dense weights exceed the available memory.
            CheckpointError, ConfigError, UnsupportedModelError: the checkpoint can't be offloaded as configured.
        """
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
            self._tiers = DeviceTiers(self._devices, self._expert_index, dtypes)
            slot_bytes = self._tiers.slot_bytes
        slots, least = pool_slots(self._expert_index, self._model_config, self._config.expert_memory, slot_bytes)
        dense_bytes = restored_bytes((self._headers[key] for key in dense), model.dtype)
        dense_bytes += scratch_bytes(self._expert_index.layouts, model.dtype)
        needed, available = dense_bytes + (0 if self._devices else slots * slot_bytes), available_bytes()
        if needed > available:
            raise BudgetError(
                f"--expert-memory: {slots} experts and the dense weights take {format_bytes(needed)}, but only "
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
                parameter._is_hf_initialized = True  # type: ignore[attr-defined] # keeps transformers from filling it
        state = {key: LazyTensor(dense_store, key, self._headers[key]) for key in dense}
        expected_dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
        info, index = original(model=model, state_dict=state, load_config=load_config, disk_offload_index=None)
        if load_config.hf_quantizer is not None and self._config.dtype != "auto":
            refuse_uncast(model, expected_dtypes)
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
        """Binds the experts modules to the pool, builds policy and engine, and returns the offloaded model."""
        offloaded: Any = model
        assert self._expert_index is not None and self._store is not None and self._pool is not None
        # requires_grad stays as transformers set it: torch's matmul picks its kernel, and so its rounding, by it
        sizes = [layout.experts for layout in self._expert_index.layouts]
        shape = len(sizes), max(sizes)
        self._transfer = self._connect(self._store)
        verify = self._verifier() if self._config.verify else None
        device_count = max(1, len(self._devices))
        # the trial of each path runs under its own cache manager: the policy must not learn from it
        trial_manager = make_cache_manager("lru", *shape, self._pool.slots, devices=device_count)
        trial = Engine(self._pool, trial_manager, self._transfer, verify)
        lock = threading.RLock()
        layer_of = self._bind_experts(self._expert_index, trial, lock)
        layers = list(layer_of.values())
        if self._devices:
            offloaded.to(self._devices[0].torch_device)
        self._choose_paths(layers, model.dtype)
        if self._tiers is not None and self._config.host_compute == "auto":
            self._tiers.enable_host_compute(layers, [module for _, module in self._experts], model.dtype)
        trial.clear()
        engine = make_engine(
            self._config, self.policy_options, self.map_persistence, self._pool, self._transfer, self._expert_index,
            verify=verify, devices=device_count,
        )  # fmt: skip
        policy = engine.cache_manager.policy
        self._async_policy = policy if isinstance(policy, AsyncPolicy) else None
        if self._tiers is not None:
            self._tiers.attach_engine(engine)
        for layer in layers:
            layer.engine = engine
        inputs = policy.needs | policy.uses
        lookahead = policy.lookahead if "lookahead" in inputs else 0
        observer = Observer(model, engine, layer_of, lookahead=lookahead) if inputs else None
        if observer is not None:
            observer.attach(model)
        handle = ModelHandle(
            self._checkpoint,
            self._expert_index,
            self._store,
            engine,
            layers,
            lock,
            self._config,
            map_persistence=self.map_persistence,
            observer=observer,
            tiers=self._tiers,
            fingerprint=self.fingerprint,
        )
        if isinstance(self._pool, RamSlotPool):
            self._pool.wait_prefaulted()
        handle.reset_stats()
        kind = type(model)
        members = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        offloaded.__class__ = type(kind.__name__, (OffloadedModel, kind), members)
        offloaded.finemoe = handle
        weakref.finalize(model, handle.close)
        return offloaded

    def _connect(self, store: DiskStore) -> ReaderThreads | HostToDeviceCopier:
        threads, bandwidth_bytes_s = self._config.reader_threads, self._config.link_bandwidth_bytes_s
        if self._tiers is not None:
            return self._tiers.make_copier(store, threads)
        return ReaderThreads(store, threads, bandwidth_bytes_s=bandwidth_bytes_s)

    def _bind_experts(self, expert_index: ExpertIndex, engine: Engine, lock: threading.RLock) -> dict[str, ExpertLayer]:
        """Replaces each experts module's weights by an expert layer over the pool. Returns these by module path."""
        numbers = {layout.module: layer for layer, layout in enumerate(expert_index.layouts)}
        layers: dict[str, ExpertLayer] = {}
        dequantizer, views = Dequantizer(), Views()
        for described, module in self._experts:
            dtypes = parameter_dtypes(described)
            layer = numbers[described.same_as or described.name]
            if self._tiers is None:
                bound = ExpertLayer(engine, lock, layer, expert_index.layouts[layer], dtypes, dequantizer, views)
            else:
                bound = self._tiers.make_layer(engine, lock, layer, dtypes, views)
            for name, parameter in described.parameters.items():
                delattr(module, name)
                module.__dict__[name] = LazyParameter(bound, name, parameter)
            module.__dict__[HANDLE] = bound
            layers[described.name] = bound
        return layers

    def undo(self) -> None:
        """Frees everything that a failed load has allocated."""
        if self._tiers is not None:
            self._tiers.close()
        if self._async_policy is not None:
            self._async_policy.close()
        if self._transfer is not None:
            self._transfer.close()
        if self._pool is not None:
            self._pool.close()
        for store in self._opened:
            store.close()

    def _choose_paths(self, layers: list[ExpertLayer], dtype: torch.dtype) -> None:
        """Compares the fast path with the reference once for each kind of experts module; uses it if it is exact."""
        chosen: dict[Any, tuple[Accumulator | None, Kernel]] = {}
        for layer, (described, module) in zip(layers, self._experts, strict=True):
            up = described.parameters.get("gate_up_proj", described.parameters.get("up_proj"))
            if up is None:
                continue
            kind = type(module), tuple((n, p.shape, p.dtype) for n, p in described.parameters.items())
            if kind not in chosen:
                width = up.shape[1] if getattr(module, "is_transposed", False) else up.shape[-1]
                kernel: Kernel = "eager"
                layer.accumulator = choose_accumulator(layer, module, width, dtype)
                if isinstance(layer, DeviceExpertLayer):
                    kernel = choose_kernel(layer, module, width, dtype, self._config.expert_kernel)
                chosen[kind] = layer.accumulator, kernel
            layer.accumulator, kernel = chosen[kind]
            if isinstance(layer, DeviceExpertLayer):
                layer.kernel = kernel

    def _verifier(self) -> Callable[[ExpertId, int], None]:
        assert self._expert_index is not None and self._pool is not None
        if self._tiers is not None:
            return DeviceVerifier(self._tiers, self._expert_index, self._files).check
        assert isinstance(self._pool, RamSlotPool)
        return SecondReader(self._files, self._expert_index, self._pool).check


_PATCH_LOCK = threading.Lock()  # one load at a time may patch transformers


@contextmanager
def patched_loader(replacement: Callable[..., Any]) -> Iterator[None]:
    """Replaces transformers' function that turns a checkpoint's tensors into parameters, for this thread's loads.

    Args:
        replacement: called with the original function, the model and transformers' load config.
    """
    with _PATCH_LOCK:
        original = modeling_utils.convert_and_load_state_dict_in_model
        own_thread = threading.get_ident()

        def wrapped(model: PreTrainedModel, state_dict: Any, load_config: Any, disk_offload_index: Any = None) -> Any:
            if threading.get_ident() != own_thread:  # another thread loads a model with plain transformers
                return original(model, state_dict, load_config, disk_offload_index)
            return replacement(original, model, load_config)

        modeling_utils.convert_and_load_state_dict_in_model = wrapped
        try:
            yield
        finally:
            modeling_utils.convert_and_load_state_dict_in_model = original
