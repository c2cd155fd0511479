"""One load under way: experts are left on `meta`, and each experts module gets a handle on the pool instead.

The seams are transformers' own: its registry of experts functions, and the one function of its loader that turns a
checkpoint's tensors into parameters, which is wrapped for the duration of a load to keep experts from it (`divert`).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from finemoe.beside import Beside
from finemoe.checkpoint import Catalog, Checkpoint, TensorHeader
from finemoe.checkpoint.convert import ExpertsModule, read_catalog
from finemoe.config import LoadConfig, format_bytes
from finemoe.dequantise import Dequantiser, scratch_bytes
from finemoe.device import Device
from finemoe.engine import Engine
from finemoe.errors import BudgetError, CheckpointError
from finemoe.experts import HANDLE, Accumulator, ExpertLayer, Kernel, LazyParameter, Views, choose_path
from finemoe.link import Link
from finemoe.maps import Keeper
from finemoe.model.devices import DeviceReader, Tiers, choose_kernel
from finemoe.model.find import find_experts, parameter_dtypes, pool_slots
from finemoe.model.observe import Observer
from finemoe.model.offload import Offload, OffloadedModel
from finemoe.model.quantised import refuse_on_devices, refuse_unasked, refuse_uncast, restored_bytes
from finemoe.policy import Controller, make_controller, make_policy
from finemoe.policy.kernel import interpreted
from finemoe.quantise import planned_copy
from finemoe.rehearsal import rehearse
from finemoe.store import DevicePool, DiskStore, Pool, available_bytes
from finemoe.store.dense import LazyTensor
from finemoe.store.verify import SecondReader
from finemoe.transfer import ReaderThreads
from finemoe.types import ExpertId
from finemoe.waves import DeviceExpertLayer


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
        self.keeper: Keeper | None = None  # of its maps
        self.fingerprint: str | None = None  # of the model, where the policy learns
        self._experts: list[tuple[ExpertsModule, nn.Module]] = []
        self._catalog: Catalog | None = None
        self._opened: list[DiskStore] = []
        self._files = checkpoint.files  # that experts are read from
        self._store: DiskStore | None = None  # over these
        self._devices = devices
        self._tiers: Tiers | None = None  # where there are devices
        self._pool: Pool | DevicePool | None = None
        self._transfer: ReaderThreads | Link | None = None
        self._beside: Beside | None = None  # the policy, where it has a thread

    def convert_and_load(self, original: Callable[..., Any], model: PreTrainedModel, load_config: Any) -> Any:
        """In place of transformers' function: keeps experts from it, and gives it slices that read directly."""
        refuse_unasked(load_config.hf_quantizer)
        self._experts = find_experts(model)
        modules = [described for described, _ in self._experts]
        routed = {f"{module.name}.{name}" for module in modules for name in module.parameters}
        dense, catalog = read_catalog(model, modules, self._headers, load_config.weight_mapping or [])
        copy = planned_copy(self._checkpoint, self._headers, catalog, self._config.expert_dtype)
        self._catalog = catalog if copy is None else copy.catalog
        slot_bytes = self._catalog.slot_bytes
        if self._devices:
            refuse_on_devices(self._catalog)
            owners = {module.name: module for module in modules}
            dtypes = [parameter_dtypes(owners[layout.module]) for layout in self._catalog.layouts]
            self._tiers = Tiers(self._devices, self._catalog, dtypes)
            slot_bytes = self._tiers.slot_bytes
        slots, least = pool_slots(self._catalog, self._model_config, self._config.expert_memory, slot_bytes)
        dense_bytes = restored_bytes((self._headers[key] for key in dense), model.dtype)
        dense_bytes += scratch_bytes(self._catalog.layouts, model.dtype)
        needed, available = dense_bytes + (0 if self._devices else slots * slot_bytes), available_bytes()
        if needed > available:
            raise BudgetError(
                f"--expert-memory: {slots} experts and the dense part take {format_bytes(needed)}, but only "
                f"{format_bytes(available)} of memory are available; give a smaller budget"
            )
        self._store = dense_store = self._open(self._checkpoint.files, catalog)
        if copy is not None:
            copy.write(dense_store)
            self._files, self._store = copy.files, self._open(copy.files, copy.catalog)
        if self._tiers is None:
            self._pool = Pool(slots, slot_bytes)
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

    def _open(self, files: Sequence[Path], catalog: Catalog) -> DiskStore:
        try:
            store = DiskStore(files, catalog, self._config.io)
        except OSError as error:
            raise CheckpointError(
                f"{error.filename}: can't be opened for --io {self._config.io} ({error.strerror})"
            ) from error
        self._opened.append(store)
        return store

    def finish(self, model: PreTrainedModel) -> Any:
        """Swap the experts' weights for handles on the pool."""
        offloaded: Any = model
        assert self._catalog is not None and self._store is not None and self._pool is not None
        # requires_grad stays as transformers set it: torch's matmul picks its kernel, and so its rounding, by it
        sizes = [layout.experts for layout in self._catalog.layouts]
        shape = len(sizes), max(sizes)
        self._transfer = self._connect(self._store)
        verify = self._verifier() if self._config.verify else None
        # experts are tried under another controller: what the policy learns is what the model does
        spread = max(1, len(self._devices))
        trial = Engine(
            self._pool, make_controller("lru", *shape, self._pool.slots, devices=spread), self._transfer, verify
        )
        lock = threading.RLock()
        layers = self._swap(self._catalog, trial, lock)
        handles = list(layers.values())
        if self._devices:
            offloaded.to(self._devices[0].torch_device)
        self._choose_paths(handles, model.dtype)
        if self._tiers is not None and self._config.host_compute == "auto":
            self._tiers.help_out(handles, [module for _, module in self._experts], model.dtype)
        trial.clear()
        rehearse(self._config.policy, **self.options)
        policy = make_policy(self._config.policy, *shape, **self.options)
        if self.keeper is not None:
            self.keeper.bring(policy)
        if policy.deliberates:
            policy = self._beside = Beside(policy, self._transfer.nudge)
        controller = Controller(
            *shape, self._pool.slots, policy, spread, sizes=sizes, explain=self._config.explain,
            jit=self.options.get("jit", interpreted),
        )  # fmt: skip
        engine = Engine(self._pool, controller, self._transfer, verify, experts=self._catalog.experts)
        if self._tiers is not None:
            self._tiers.follow(engine)
        for handle in handles:
            handle.engine = engine
        seen = controller.policy.needs | controller.policy.uses
        ahead = controller.policy.lookahead if "lookahead" in seen else 0
        observer = Observer(model, engine, layers, lookahead=ahead) if seen else None
        if observer is not None:
            observer.attach(model)
        parts = self._checkpoint, self._catalog, self._store, engine, handles, lock, self._config
        offload = Offload(
            *parts, keeper=self.keeper, observer=observer, tiers=self._tiers, fingerprint=self.fingerprint
        )
        if isinstance(self._pool, Pool):
            self._pool.await_memory()
        offload.reset_stats()
        kind = type(model)
        members = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        offloaded.__class__ = type(kind.__name__, (OffloadedModel, kind), members)
        offloaded.finemoe = offload
        weakref.finalize(model, offload.close)
        return offloaded

    def _connect(self, store: DiskStore) -> ReaderThreads | Link:
        threads, bandwidth_bytes_s = self._config.reader_threads, self._config.link_bandwidth_bytes_s
        if self._tiers is not None:
            return self._tiers.connect(store, threads)
        return ReaderThreads(store, threads, bandwidth_bytes_s=bandwidth_bytes_s)

    def _swap(self, catalog: Catalog, engine: Engine, lock: threading.RLock) -> dict[str, ExpertLayer]:
        """A handle in the place of each experts module's weights; by the module's path."""
        numbers = {layout.module: layer for layer, layout in enumerate(catalog.layouts)}
        layers: dict[str, ExpertLayer] = {}
        dequantiser, views = Dequantiser(), Views()
        for described, module in self._experts:
            dtypes = parameter_dtypes(described)
            layer = numbers[described.same_as or described.name]
            if self._tiers is None:
                handle = ExpertLayer(engine, lock, layer, catalog.layouts[layer], dtypes, dequantiser, views)
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
        assert self._catalog is not None and self._pool is not None
        if self._tiers is not None:
            return DeviceReader(self._tiers, self._catalog, self._files).check
        assert isinstance(self._pool, Pool)
        return SecondReader(self._files, self._catalog, self._pool).check
