"""Loads a GGUF model for `finemoe.load`: checks settings, connects policy and maps, attaches the model handle."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from finemoe.checkpoint import Checkpoint, ExpertIndex
from finemoe.config import LoadConfig
from finemoe.engine.async_policy import AsyncPolicy
from finemoe.engine.engine import Engine
from finemoe.engine.engine_factory import make_engine
from finemoe.errors import ConfigError
from finemoe.gguf.expert_memory import ExpertMemory
from finemoe.gguf.file import Array, GgufFile, open_gguf
from finemoe.gguf.load import GgufOptions, load_parts, observe
from finemoe.gguf.locate import locate_gguf
from finemoe.gguf.model import GgufModel
from finemoe.learned import MapPersistence, open_map_persistence
from finemoe.model.handle import ModelHandle
from finemoe.policy import policy_class
from finemoe.store.reader_threads import ReaderThreads
from finemoe.store.verify import SecondReader
from finemoe.system import end_openmp_threads
from finemoe.types import ExpertId

_OF_CHECKPOINTS = ("dtype", "expert_dtype", "trust_remote_code", "host_memory", "expert_kernel", "host_compute")
_VOLATILE = ("general.file_type", "general.quantization_version", "split.")  # not in the fingerprint
_DIGITS = 16


def load_gguf(config: LoadConfig) -> GgufModel:
    """Load the model named by `config`.

    Raises:
        CheckpointError, UnsupportedModelError, BudgetError: see `load_parts`.
        ConfigError: see `load_parts`; or a setting has no effect on GGUF models.
    """
    refuse_settings(config)
    assert config.model is not None
    file = open_gguf(locate_gguf(config.model, config.revision))
    identity = fingerprint(file)
    keeper: MapPersistence | None = None
    if policy_class(config.policy).is_persistent:
        keeper = open_map_persistence(config.map_store, config.policy, identity, config.model)

    engines: list[Engine] = []

    def assemble(memory: ExpertMemory, transfer: ReaderThreads, expert_index: ExpertIndex) -> Engine:
        verify = SecondReader(file.files, expert_index, memory).check if config.verify else None
        chosen = policy_options(config, identity)
        engines.append(make_engine(config, chosen, keeper, memory, transfer, expert_index, verify=verify))
        return engines[-1]

    options = GgufOptions(
        config.expert_memory,
        config.io,
        config.reader_threads,
        config.threads,
        "f16" if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
        config.link_bandwidth_bytes_s,
    )
    try:
        model = GgufModel(load_parts(file, options, assemble))
    except BaseException:
        for engine in engines:
            if isinstance(engine.cache_manager.policy, AsyncPolicy):
                engine.cache_manager.policy.close()
        raise
    parts = model.parts
    policy = parts.engine.cache_manager.policy
    if seen := policy.needs | policy.uses:
        observe(parts, policy.lookahead if "lookahead" in seen else 0)
    learned = identity if policy_class(config.policy).is_persistent else None
    handle = ModelHandle(
        Checkpoint(config.model, file.files[0].parent, file.files),
        parts.expert_index,
        parts.store,
        parts.engine,
        [],
        model.lock,
        config,
        map_persistence=keeper,
        fingerprint=learned,
        resources=parts.resources,
    )
    model.attach(handle)
    handle.reset_stats()
    if parts.memory.slots == parts.expert_index.experts:  # in the background; then passes run without callbacks
        layouts = enumerate(parts.expert_index.layouts)
        parts.engine.preload([ExpertId(layer, expert) for layer, each in layouts for expert in range(each.experts)])
    end_openmp_threads()  # the next pass may run on another thread
    return model


def refuse_settings(config: LoadConfig) -> None:
    """Raises `ConfigError` for a setting that has no effect on a GGUF model."""
    defaults = {each.name: each.default for each in fields(config)}
    for name in _OF_CHECKPOINTS:
        if getattr(config, name) != defaults[name]:
            raise ConfigError(f"--{name.replace('_', '-')}: has no effect on a GGUF model; leave it out")
    if config.device not in {"auto", "cpu"}:
        raise ConfigError(f"--device: GGUF models run on the CPU, not on {config.device}; leave it out")


def policy_options(config: LoadConfig, identity: str) -> dict[str, Any]:
    """Constructor options of the policy, besides the model's shape.

    Raises:
        FinemoeError: the predictors can't be read, or are for another model.
    """
    options: dict[str, Any] = {}
    if policy_class(config.policy).compiles:
        from finemoe.jit import compiler

        options["jit"] = compiler()
    if config.predictors is not None:
        from finemoe.learned.promoe_predictors import load as load_predictors

        options["predictors"] = load_predictors(Path(config.predictors), identity)
    return options


def fingerprint(file: GgufFile) -> str:
    """Identifies the model: 16 hexadecimal digits, independent of how tensors are split into files."""
    lasting = {
        key: list(value) if isinstance(value, Array) else value
        for key, value in file.metadata.items()
        if not key.startswith(_VOLATILE)
    }
    tensors = sorted((info.name, info.type, info.shape) for info in file.tensors.values())
    return hashlib.sha256(json.dumps([lasting, tensors], sort_keys=True).encode()).hexdigest()[:_DIGITS]
