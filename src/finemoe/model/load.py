"""Loads a model with its experts left on `meta`, and gives each experts module a handle on the pool instead.

The seams are transformers' own: its registry of experts functions, and the one function of its loader that turns a
checkpoint's tensors into parameters, which is wrapped for the duration of a load to keep experts from it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, modeling_utils

from finemoe.beside import Beside
from finemoe.checkpoint import Catalog, Checkpoint, TensorHeader, locate, read_headers
from finemoe.checkpoint.convert import ExpertsModule, read_catalog
from finemoe.checkpoint.fingerprint import fingerprint
from finemoe.config import LoadConfig, format_bytes
from finemoe.engine import Engine
from finemoe.errors import BudgetError, CheckpointError, ConfigError, UnsupportedModelError
from finemoe.experts import HANDLE, IMPLEMENTATION, ExpertLayer, LazyParameter, choose_path
from finemoe.maps import Keeper, open_keeper, refuse_useless
from finemoe.model.find import find_experts, model_class, pool_slots, read_config, transformers_errors
from finemoe.model.observe import Observer
from finemoe.model.offload import Offload, OffloadedModel
from finemoe.policy import Controller, make_controller, make_policy, policy_class
from finemoe.store import DiskStore, Pool, available_bytes
from finemoe.store.dense import LazyTensor
from finemoe.store.verify import SecondReader
from finemoe.transfer import ReaderThreads
from finemoe.types import ExpertId

_LOADING = threading.Lock()  # transformers' loader is wrapped by one load at a time


def load(
    model: str | Path | None = None,
    *,
    expert_memory: str = "25%",
    policy: str = "lfru",
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
    of its experts in memory. `model.finemoe.stats()` tells what the pool did; `close()`, or a `with` block, frees it.

    Args:
        model: folder or Hugging Face hub id; `None` is the built-in reference model.
        expert_memory: hard limit for resident experts: bytes (`2GiB`), a share (`25%`) or `all`.
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
    checkpoint = locate(config.model or reference_model(), config.revision)
    model_config = read_config(checkpoint.folder, trust_remote_code=config.trust_remote_code)
    headers = read_headers(checkpoint.files)
    loading = _Loading(config, checkpoint, model_config, headers)
    loading.options = policy_options(config, checkpoint, headers)
    if kind.remembers:
        model_name = fingerprint(checkpoint.folder, headers)
        loading.keeper = open_keeper(config.map_store, config.policy, model_name, checkpoint.name)
    try:
        with transformers_errors(checkpoint.folder), _diverted(loading.convert_and_load):
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


def refuse_made_up(info: dict[str, Any]) -> None:
    """Raises `CheckpointError` where transformers made a parameter up, for want of a tensor that fits."""
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise CheckpointError(f"{name}: the checkpoint has shape {list(stored)}, the model expects {list(expected)}")
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"the checkpoint has no tensor for {missing[0]}{more}; is it complete?")
    if errors := info.get("error_msgs"):
        raise CheckpointError(f"the checkpoint can't be loaded: {str(errors[0]).splitlines()[0]}")


class _Loading:
    """One load under way: what the wrapped loader has set up so far."""

    def __init__(
        self,
        config: LoadConfig,
        checkpoint: Checkpoint,
        model_config: PreTrainedConfig,
        headers: dict[str, TensorHeader],
    ) -> None:
        self._config = config
        self._checkpoint = checkpoint
        self._model_config = model_config
        self._headers = headers
        self.options: dict[str, Any] = {}  # of the policy
        self.keeper: Keeper | None = None  # of its maps
        self._experts: list[tuple[ExpertsModule, nn.Module]] = []
        self._catalog: Catalog | None = None
        self._store: DiskStore | None = None
        self._pool: Pool | None = None
        self._transfer: ReaderThreads | None = None

    def convert_and_load(self, original: Callable[..., Any], model: PreTrainedModel, load_config: Any) -> Any:
        """In place of transformers' function: keeps experts from it, and gives it slices that read directly."""
        if load_config.hf_quantizer is not None:
            raise UnsupportedModelError(f"{self._checkpoint.name} is quantised, which finemoe does not offload yet")
        self._experts = find_experts(model)
        modules = [described for described, _ in self._experts]
        routed = {f"{module.name}.{name}" for module in modules for name in module.parameters}
        dense, self._catalog = read_catalog(model, modules, self._headers, load_config.weight_mapping or [])
        slots = pool_slots(self._catalog, self._model_config, self._config.expert_memory)
        dense_bytes = sum(self._headers[key].length_bytes for key in dense)
        needed, available = slots * self._catalog.slot_bytes + dense_bytes, available_bytes()
        if needed > available:
            raise BudgetError(
                f"--expert-memory: {slots} experts and the dense part take {format_bytes(needed)}, but only "
                f"{format_bytes(available)} of memory are available; give a smaller budget"
            )
        try:
            self._store = DiskStore(self._checkpoint.files, self._catalog, self._config.io)
        except OSError as error:
            raise CheckpointError(
                f"{error.filename}: can't be opened for --io {self._config.io} ({error.strerror})"
            ) from error
        self._pool = Pool(slots, self._catalog.slot_bytes)
        for module in modules:
            for parameter in module.parameters.values():
                parameter._is_hf_initialized = True  # type: ignore[attr-defined] # nothing to fill in
        state = {key: LazyTensor(self._store, key, self._headers[key]) for key in dense}
        info, index = original(model=model, state_dict=state, load_config=load_config, disk_offload_index=None)
        info.missing_keys -= routed
        return info, index

    def finish(self, model: PreTrainedModel) -> Any:
        """Swap the experts' weights for handles on the pool."""
        assert self._catalog is not None and self._store is not None and self._pool is not None
        # requires_grad stays as transformers set it: torch's matmul picks its kernel, and so its rounding, by it
        shape = len(self._catalog.layouts), max(layout.experts for layout in self._catalog.layouts)
        bandwidth_bytes_s = self._config.link_bandwidth_bytes_s
        self._transfer = ReaderThreads(self._store, self._config.reader_threads, bandwidth_bytes_s=bandwidth_bytes_s)
        verify = self._verifier() if self._config.verify else None
        # experts are tried under another controller: what the policy learns is what the model does
        trial = Engine(self._pool, make_controller("lru", *shape, self._pool.slots), self._transfer, verify)
        lock = threading.RLock()
        layouts = {layout.module: (layer, layout) for layer, layout in enumerate(self._catalog.layouts)}
        layers: dict[str, ExpertLayer] = {}
        for described, module in self._experts:
            dtypes = {name: parameter.dtype for name, parameter in described.parameters.items()}
            layer, layout = layouts[described.same_as or described.name]
            handle = ExpertLayer(trial, lock, layer, layout, dtypes)
            for name, parameter in described.parameters.items():
                delattr(module, name)
                module.__dict__[name] = LazyParameter(handle, name, parameter)
            module.__dict__[HANDLE] = handle
            layers[described.name] = handle
        handles = list(layers.values())
        self._choose_paths(handles, model.dtype)
        trial.clear()
        policy = make_policy(self._config.policy, *shape, **self.options)
        if self.keeper is not None:
            self.keeper.bring(policy)
        if policy.compiles:  # it takes long enough to wait for
            policy = Beside(policy, self._transfer.nudge)
        controller = Controller(*shape, self._pool.slots, policy, explain=self._config.explain)
        engine = Engine(self._pool, controller, self._transfer, verify, experts=self._catalog.experts)
        for handle in handles:
            handle.engine = engine
        seen = controller.policy.needs | controller.policy.uses
        observer = Observer(model, engine, layers, lookahead=int("lookahead" in seen)) if seen else None
        if observer is not None:
            observer.attach()
        offload = Offload(
            self._checkpoint,
            self._catalog,
            self._store,
            engine,
            handles,
            lock,
            self._config,
            keeper=self.keeper,
            observer=observer,
        )
        offload.reset_stats()
        kind = type(model)
        members = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        offloaded: Any = model
        offloaded.__class__ = type(kind.__name__, (OffloadedModel, kind), members)
        offloaded.finemoe = offload
        weakref.finalize(model, offload.close)
        return offloaded

    def undo(self) -> None:
        """Free whatever a failed load has taken."""
        if self._transfer is not None:
            self._transfer.close()
        if self._pool is not None:
            self._pool.close()
        if self._store is not None:
            self._store.close()

    def _choose_paths(self, layers: list[ExpertLayer], dtype: torch.dtype) -> None:
        """Try the fast path against the twin once for each kind of experts module."""
        chosen: dict[Any, Any] = {}
        for handle, (described, module) in zip(layers, self._experts, strict=True):
            up = described.parameters.get("gate_up_proj", described.parameters.get("up_proj"))
            if up is None:
                continue
            kind = type(module), tuple((n, p.shape, p.dtype) for n, p in described.parameters.items())
            if kind not in chosen:
                width = up.shape[1] if getattr(module, "is_transposed", False) else up.shape[-1]
                chosen[kind] = choose_path(handle, module, width, dtype)
            handle.accumulator = chosen[kind]

    def _verifier(self) -> Callable[[ExpertId, int], None]:
        assert self._catalog is not None and self._pool is not None
        return SecondReader(self._checkpoint.files, self._catalog, self._pool).check


@contextmanager
def _diverted(replacement: Callable[..., Any]) -> Iterator[None]:
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
