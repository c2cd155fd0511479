"""Loads a model whose experts live in a pool: what is asked for is checked, then `Loading` does the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from finemoe.checkpoint import Checkpoint, TensorHeader, locate, read_headers
from finemoe.checkpoint.headers import fingerprint
from finemoe.config import LoadConfig, budget_text
from finemoe.engine.expert_layer import IMPLEMENTATION
from finemoe.errors import ConfigError
from finemoe.gpu.device import open_devices
from finemoe.learned import open_map_persistence, refuse_useless
from finemoe.model.introspect import model_class, read_config, refuse_made_up, transformers_errors
from finemoe.model.loader import Loading, diverted
from finemoe.policy import policy_class
from finemoe.system import release_threads


def load(
    model: str | Path | None = None,
    *,
    expert_memory: str | float = "25%",
    device: str = "auto",
    host_memory: str | float | None = None,
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
        expert_memory: hard limit for resident experts: bytes (`2GiB`, or an int), a share (`25%`, or the float 0.25),
            or `all`.
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
            expert_memory=budget_text(expert_memory),
            device=device,
            host_memory=None if host_memory is None else budget_text(host_memory, "--host-memory"),
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
    checkpoint = locate(chosen_model(config.model), config.revision)
    model_config = read_config(checkpoint.folder, trust_remote_code=config.trust_remote_code)
    headers = read_headers(checkpoint.files)
    loading = Loading(config, checkpoint, model_config, headers, devices)
    loading.options = policy_options(config, checkpoint, headers)
    if kind.is_persistent:
        loading.fingerprint = fingerprint(checkpoint.folder, headers)
        loading.keeper = open_map_persistence(config.map_store, config.policy, loading.fingerprint, checkpoint.name)
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
        offloaded = loading.finish(model)
    except BaseException:
        loading.undo()
        raise
    release_threads()  # another thread may run it
    return offloaded


def policy_options(config: LoadConfig, checkpoint: Checkpoint, headers: dict[str, TensorHeader]) -> dict[str, Any]:
    """What a policy is made with beyond the model's shape.

    Raises:
        FinemoeError: the predictors can't be read, or are for another model.
    """
    options: dict[str, Any] = {}
    if policy_class(config.policy).compiles:
        from finemoe.jit import compiler

        options["jit"] = compiler()
    if config.predictors is not None:
        from finemoe.learned.predictors import load as load_predictors

        model = fingerprint(checkpoint.folder, headers)
        options["predictors"] = load_predictors(Path(config.predictors), model)
    return options


def chosen_model(model: str | None) -> str:
    """The model that `--model` names; where it is left out, the built-in one's folder, built on first use.

    Raises:
        ConfigError: the name is empty.
    """
    if model is None:
        return reference_model()
    if not model.strip():  # an unset variable of a script, perhaps
        raise ConfigError("--model: is empty; give a folder or a hub id, or leave it out for the reference model")
    return model


def reference_model() -> str:
    """The folder of the built-in model, built on first use."""
    from finemoe.model.reference import ensure

    return str(ensure())
