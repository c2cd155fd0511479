"""`finemoe.load`: checks the settings, then runs a `ModelLoader`."""

from __future__ import annotations

from dataclasses import fields
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack, get_type_hints

import torch

from finemoe.budget import budget_text
from finemoe.checkpoint import Checkpoint, TensorHeader, locate, read_headers
from finemoe.checkpoint.headers import fingerprint
from finemoe.config import LoadConfig
from finemoe.engine.expert_layer import IMPLEMENTATION
from finemoe.errors import ConfigError
from finemoe.gpu.device import open_devices
from finemoe.learned import open_map_persistence
from finemoe.model.backend import load_config
from finemoe.model.introspect import model_class, read_config, refuse_incomplete, transformers_errors
from finemoe.model.loader import ModelLoader, patched_loader
from finemoe.policy import policy_class
from finemoe.system import end_openmp_threads


class LoadSettings(TypedDict, total=False):
    """The keyword arguments of `load`; defaults and descriptions are in `LoadConfig`."""

    expert_memory: str | float
    device: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | torch.dtype
    expert_dtype: str
    policy: str
    explain: bool
    revision: str | None
    trust_remote_code: bool
    predictors: str | Path | None
    map_store: str | Path | None
    io: Literal["auto", "direct", "buffered"]
    reader_threads: int
    link_bandwidth: str | None
    verify: bool
    threads: int
    kv_cache_dtype: Literal["auto", "q8_0"]
    host_memory: str | float | None
    expert_kernel: Literal["auto", "eager", "grouped_mm"]
    host_compute: Literal["off", "auto"]


def load(model: str | Path | None = None, **settings: Unpack[LoadSettings]) -> Any:
    """Loads a transformers model whose routed experts live in a bounded pool.

    The model generates, streams, batches and serves as an assistant like any other, and answers exactly as with all of
    its experts in memory, unless `expert_dtype` is lossy. `model.finemoe.stats()` reports hits, bytes and time;
    `close()`, or a `with` block, frees the pool.

    Args:
        model: folder or Hugging Face hub id; `None` is the built-in reference model.
        **settings: fields of `LoadConfig`, the same as the command line's flags. A budget may also be an int (bytes) or
            a float (a share), a dtype torch's, a path a `Path`.

    Raises:
        CheckpointError: the checkpoint is missing, incomplete or damaged.
        UnsupportedModelError: its experts can't be offloaded exactly.
        ConfigError: a setting can't be used; `BudgetError` for expert memory.
        TypeError: no setting of that name.
    """
    values: dict[str, Any] = {"model": model, **settings}
    if unknown := values.keys() - {field.name for field in fields(LoadConfig)}:
        raise TypeError(f"load() got an unexpected keyword argument {min(unknown)!r}")
    for name, value in values.items():
        if isinstance(value, Path):
            values[name] = str(value)
        elif isinstance(value, torch.dtype):
            values[name] = str(value).removeprefix("torch.")
        elif name == "expert_memory" or (name == "host_memory" and value is not None):
            values[name] = budget_text(value, f"--{name.replace('_', '-')}")
    return load_config(LoadConfig(**values))


def _show_settings() -> None:
    """Gives `load` the signature and argument descriptions of `LoadConfig`, for `help()` and notebooks."""
    shown = [field for field in fields(LoadConfig) if field.name != "model"]
    hints = get_type_hints(LoadSettings)
    load.__signature__ = signature(load).replace(  # type: ignore[attr-defined]
        parameters=[
            signature(load).parameters["model"],
            *(
                Parameter(each.name, Parameter.KEYWORD_ONLY, default=each.default, annotation=hints[each.name])
                for each in shown
            ),
        ]
    )
    assert load.__doc__ is not None
    lines = "\n".join(f"        {each.name}: {each.metadata['help']}." for each in shown)
    load.__doc__ += f"\n    Settings:\n{lines}\n"


_show_settings()


def load_checkpoint(config: LoadConfig) -> Any:
    """A transformers model, by settings that `backend.load_config` has checked."""
    config.refuse_gguf_settings()
    if config.threads:
        torch.set_num_threads(config.threads)
    kind = policy_class(config.policy)
    devices = open_devices(config.device)
    if devices:
        config.refuse_cpu_settings()
    else:
        config.refuse_gpu_settings()
    checkpoint = locate(chosen_model(config.model), config.revision)
    model_config = read_config(checkpoint.folder, trust_remote_code=config.trust_remote_code)
    headers = read_headers(checkpoint.files)
    loader = ModelLoader(config, checkpoint, model_config, headers, devices)
    loader.policy_options = policy_options(config, checkpoint, headers)
    if kind.is_persistent:
        loader.fingerprint = fingerprint(checkpoint.folder, headers)
        loader.map_persistence = open_map_persistence(
            config.map_store, config.policy, loader.fingerprint, checkpoint.name
        )
    try:
        with transformers_errors(checkpoint.folder), patched_loader(loader.convert_and_load):
            model, info = model_class(model_config).from_pretrained(
                checkpoint.folder,
                config=model_config,
                dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
                experts_implementation=IMPLEMENTATION,
                use_safetensors=True,
                trust_remote_code=config.trust_remote_code,
                ignore_mismatched_sizes=True,  # `refuse_incomplete` reports them in one line
                output_loading_info=True,
            )
        refuse_incomplete(info)
        offloaded = loader.finish(model)
    except BaseException:
        loader.undo()
        raise
    end_openmp_threads()  # another thread may run the model
    return offloaded


def policy_options(config: LoadConfig, checkpoint: Checkpoint, headers: dict[str, TensorHeader]) -> dict[str, Any]:
    """Constructor arguments of a policy besides the model's shape.

    Raises:
        FinemoeError: the predictors can't be read, or are for another model.
    """
    options: dict[str, Any] = {}
    if policy_class(config.policy).compiles:
        from finemoe.jit import compiler

        options["jit"] = compiler()
    if config.predictors is not None:
        from finemoe.learned.promoe_predictors import load as load_predictors

        model = fingerprint(checkpoint.folder, headers)
        options["predictors"] = load_predictors(Path(config.predictors), model)
    return options


def chosen_model(model: str | None) -> str:
    """The model given by `--model`; the reference model's folder if that is `None`.

    Raises:
        ConfigError: the name is empty.
    """
    if model is None:
        return reference_model()
    if not model.strip():  # e.g. an unset variable of a shell script
        raise ConfigError("--model: is empty; give a folder or a hub id, or leave it out for the reference model")
    return model


def reference_model() -> str:
    """The folder of the built-in reference model, which is built on first use."""
    from finemoe.model.reference import ensure

    return str(ensure())
