"""Loads a model with its experts left on `meta`, and gives each experts module a handle on the pool instead.

The seams are transformers' own: its registry of experts functions, and the one function of its loader that turns a
checkpoint's tensors into parameters, which is wrapped for the duration of a load to keep experts from it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from finemoe.beside import Beside
from finemoe.checkpoint import Catalog, Checkpoint, TensorHeader, locate, read_headers
from finemoe.checkpoint.convert import ExpertsModule, read_catalog
from finemoe.checkpoint.fingerprint import fingerprint
from finemoe.config import LoadConfig, format_bytes
from finemoe.dequantise import Dequantiser, scratch_bytes
from finemoe.device import Device, open_devices
from finemoe.engine import Engine
from finemoe.errors import BudgetError, CheckpointError, ConfigError
from finemoe.experts import HANDLE, IMPLEMENTATION, Accumulator, ExpertLayer, Kernel, LazyParameter, choose_path
from finemoe.link import Link
from finemoe.maps import Keeper, open_keeper, refuse_useless
from finemoe.model.devices import DeviceReader, Tiers, choose_kernel
from finemoe.model.divert import diverted
from finemoe.model.find import (
    find_experts,
    model_class,
    parameter_dtypes,
    pool_slots,
    read_config,
    refuse_made_up,
    transformers_errors,
)
from finemoe.model.observe import Observer
from finemoe.model.offload import Offload, OffloadedModel
from finemoe.model.quantised import refuse_on_devices, refuse_unasked, refuse_uncast, restored_bytes
from finemoe.policy import Controller, make_controller, make_policy, policy_class
from finemoe.quantise import planned_copy
from finemoe.rehearsal import rehearse
from finemoe.store import DevicePool, DiskStore, Pool, available_bytes
from finemoe.store.dense import LazyTensor
from finemoe.store.verify import SecondReader
from finemoe.transfer import ReaderThreads
from finemoe.types import ExpertId
from finemoe.waves import DeviceExpertLayer


def load(
    model: str | Path | None = None,
    *,
    expert_memory: str = "25%",
    device: str = "auto",
    host_memory: str | None = None,
    expert_kernel: Literal["auto", "eager", "grouped_mm"] = "auto",
    host_compute: Literal["off", "auto"] = "off",
    expert_dtype: str = "stored",
    policy: str = "finemoe",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | torch.dtype = "auto",
    io: Literal["auto", "direct", "buffered"] = "auto",
    reader_threads: int = 4,
    link_bandwidth: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    predictors: str | Path | None = None,
    map_store: str | Path | None = None,
    explain: bool = False,
    verify: bool = False,
) -> Any:
    """A transformers model whose routed experts live in a bounded pool.

    It generates, streams, batches and serves as an assistant like any other, and answers exactly as it would with all
    of its experts in memory, unless `expert_dtype` asks for less. `model.finemoe.stats()` tells what the pool did;
    `close()`, or a `with` block, frees it.

    Args:
        model: folder or Hugging Face hub id; `None` is the built-in reference model.
        expert_memory: hard limit for resident experts: bytes (`2GiB`), a share (`25%`) or `all`.
        device: where the model runs and its pool is: `cpu`, `cuda`, one or several devices (`cuda:0,cuda:1`), or
            `auto`: `cuda` where there is one.
        host_memory: on a GPU: pinned memory for experts between disk and GPU, like `expert_memory`; by default all of
            them, or as many as fit.
        expert_kernel: on a GPU: which of transformers' experts implementations the arithmetic is that of; `auto` is
            `grouped_mm` where its results do not depend on what was resident, else `eager`.
        host_compute: on a GPU: `auto` computes missing experts of few tokens on the CPU where that is faster than to
            copy them; answers then differ in rounding, by what was resident.
        expert_dtype: `int8` or `int4` keep experts in fewer bits, which is lossy, by a copy in the cache folder.
        policy: what to keep and what to prefetch; one of `finemoe.policy.POLICIES`.
        dtype: of computation; `auto` takes the checkpoint's.
        io: `direct` reads past the page cache, `buffered` through it, `auto` chooses.
        reader_threads: threads that read experts.
        link_bandwidth: for experiments: move experts no faster than this many bytes per second (`500MiB`).
        revision: hub revision.
        trust_remote_code: run modelling code that the model's repository ships.
        predictors: the file that `finemoe trace train` wrote, of a policy that needs one.
        map_store: the file that a policy that learns starts from, and that `close()` leaves what it learned in; by
            default one for each model and policy in the user's cache folder, `none` for nothing.
        explain: count by layer and by source, for `model.finemoe.explain()`.
        verify: debug: read every landed expert a second time, by another path, and compare.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete or damaged.
        UnsupportedModelError: its experts can't be offloaded exactly.
        ConfigError: an argument can't be used; `BudgetError` where it is the expert memory.
    """
    name = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    return load_config(
        LoadConfig(
            model=None if model is None else str(model),
            revision=revision,
            dtype=name,  # type: ignore[arg-type] # checked by LoadConfig
            trust_remote_code=trust_remote_code,
            expert_memory=expert_memory,
            device=device,
            host_memory=host_memory,
            expert_kernel=expert_kernel,
            host_compute=host_compute,
            expert_dtype=expert_dtype,
            policy=policy,
            predictors=None if predictors is None else str(predictors),
            map_store=None if map_store is None else str(map_store),
            io=io,
            reader_threads=reader_threads,
            link_bandwidth=link_bandwidth,
            explain=explain,
            verify=verify,
        )
    )


def load_config(config: LoadConfig) -> Any:
    """`load`, from a `LoadConfig`."""
    kind = policy_class(config.policy)  # an unknown one is refused before anything is read
    if ("predictors" in kind.needs) != (config.predictors is not None):
        raise ConfigError(
            f"--policy {config.policy}: needs --predictors FILE, from finemoe trace train"
            if config.predictors is None
            else f"--predictors: --policy {config.policy} takes none"
        )
    refuse_useless(config.map_store, config.policy)
    devices = open_devices(config.device)
    if devices:
        config.refuse_cpu_settings()
    else:
        config.refuse_gpu_settings()
    checkpoint = locate(config.model or reference_model(), config.revision)
    model_config = read_config(checkpoint.folder, trust_remote_code=config.trust_remote_code)
    headers = read_headers(checkpoint.files)
    loading = _Loading(config, checkpoint, model_config, headers, devices)
    loading.options = policy_options(config, checkpoint, headers)
    if kind.remembers:
        model_name = fingerprint(checkpoint.folder, headers)
        loading.keeper = open_keeper(config.map_store, config.policy, model_name, checkpoint.name)
    try:
        with transformers_errors(checkpoint.folder), diverted(loading.convert_and_load):
            model, info = model_class(model_config).from_pretrained(
                checkpoint.folder,
                config=model_config,
                dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
                experts_implementation=IMPLEMENTATION,
                use_safetensors=True,
                trust_remote_code=config.trust_remote_code,
                ignore_mismatched_sizes=True,  # refused below, in one line
                output_loading_info=True,
            )
        refuse_made_up(info)
        return loading.finish(model)
    except BaseException:
        loading.undo()
        raise


def policy_options(config: LoadConfig, checkpoint: Checkpoint, headers: dict[str, TensorHeader]) -> dict[str, Any]:
    """What a policy is made with beyond the model's shape.

    Raises:
        FinemoeError: the predictors can't be read, or are for another model.
    """
    options: dict[str, Any] = {}
    if policy_class(config.policy).compiles:
        from finemoe.compiled import compiler

        options["jit"] = compiler()
    if config.predictors is not None:
        from finemoe.predictors import load as load_predictors

        model = fingerprint(checkpoint.folder, headers)
        options["predictors"] = load_predictors(Path(config.predictors), model)
    return options


def reference_model() -> str:
    """The folder of the built-in model, built on first use."""
    from finemoe.reference import ensure

    return str(ensure())


class _Loading:
    """One load under way: what the wrapped loader has set up so far."""

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
        self._experts: list[tuple[ExpertsModule, nn.Module]] = []
        self._catalog: Catalog | None = None
        self._opened: list[DiskStore] = []
        self._files = checkpoint.files  # that experts are read from
        self._store: DiskStore | None = None  # over these
        self._devices = devices
        self._tiers: Tiers | None = None  # where there are devices
        self._pool: Pool | DevicePool | None = None
        self._transfer: ReaderThreads | Link | None = None

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
        shape = len(self._catalog.layouts), max(layout.experts for layout in self._catalog.layouts)
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
        if policy.compiles:  # it takes long enough to wait for
            policy = Beside(policy, self._transfer.nudge)
        controller = Controller(*shape, self._pool.slots, policy, spread, explain=self._config.explain)
        engine = Engine(self._pool, controller, self._transfer, verify, experts=self._catalog.experts)
        if self._tiers is not None:
            self._tiers.follow(engine)
        for handle in handles:
            handle.engine = engine
        seen = controller.policy.needs | controller.policy.uses
        observer = Observer(model, engine, layers, lookahead=int("lookahead" in seen)) if seen else None
        if observer is not None:
            observer.attach()
        parts = self._checkpoint, self._catalog, self._store, engine, handles, lock, self._config
        offload = Offload(*parts, keeper=self.keeper, observer=observer, tiers=self._tiers)
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
        dequantiser = Dequantiser()
        for described, module in self._experts:
            dtypes = parameter_dtypes(described)
            layer = numbers[described.same_as or described.name]
            if self._tiers is None:
                handle = ExpertLayer(engine, lock, layer, catalog.layouts[layer], dtypes, dequantiser)
            else:
                handle = self._tiers.layer(engine, lock, layer, dtypes)
            for name, parameter in described.parameters.items():
                delattr(module, name)
                module.__dict__[name] = LazyParameter(handle, name, parameter)
            module.__dict__[HANDLE] = handle
            layers[described.name] = handle
        return layers

    def undo(self) -> None:
        """Free whatever a failed load has taken."""
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
