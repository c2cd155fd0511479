"""Inspects transformers models: class, experts modules, experts per token, context length, pool size."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from finemoe.budget import format_bytes, parse_budget
from finemoe.checkpoint import ExpertIndex
from finemoe.checkpoint.weight_conversion import ExpertsModule
from finemoe.errors import BudgetError, CheckpointError, FinemoeError, UnsupportedModelError
from finemoe.model.quantized import refuse_unrestored, restore_on_load

# slots that the pool must have beyond one token's experts, for a transfer in flight
IN_FLIGHT_SLOTS = 1
# names of the number of experts per token in configs
_ACTIVE = (
    "num_experts_per_tok", "num_experts_per_token", "num_selected_experts", "experts_per_token", "top_k_experts",
    "moe_topk", "moe_top_k", "moe_k", "top_k",
)  # fmt: skip


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Reads a model's config and checks that the model can be offloaded, as far as the config shows.

    Raises:
        CheckpointError: config.json is damaged, or its model type is unknown to transformers.
        UnsupportedModelError: quantized in a way that can't be dequantized, or it needs `trust_remote_code`.
    """
    try:
        raw = json.loads((folder / "config.json").read_text())
        model_type, remote = raw.get("model_type"), "auto_map" in raw
        quantized = raw.get("quantization_config") or (raw.get("text_config") or {}).get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / 'config.json'}: can't be read ({error})") from error
    if not (isinstance(model_type, str) and model_type in CONFIG_MAPPING) and not (remote and trust_remote_code):
        if remote:
            raise UnsupportedModelError(
                f"{folder} needs modelling code of its own; if you trust it, give --trust-remote-code"
            )
        if model_type is None:
            raise CheckpointError(f"{folder / 'config.json'}: names no model_type; is this a transformers checkpoint?")
        raise CheckpointError(
            f"{folder / 'config.json'}: transformers {transformers.__version__} knows no model type {model_type!r}"
        )
    if quantized:
        refuse_unrestored(folder, quantized)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # configs validate themselves and raise any type
        raise CheckpointError(f"{folder / 'config.json'}: {str(error).splitlines()[0]}") from error
    restore_on_load(config)
    return config


def model_class(config: PreTrainedConfig) -> Any:
    """The class that the checkpoint's config names, else `AutoModelForCausalLM`."""
    for name in config.architectures or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, PreTrainedModel):
            return named
    return AutoModelForCausalLM


@contextmanager
def transformers_errors(folder: Path) -> Iterator[None]:
    """Turns any error that transformers raises for an inconsistent config or checkpoint into a `CheckpointError`."""
    try:
        yield
    except (FinemoeError, MemoryError):
        raise
    except OSError as error:
        place = error.filename or folder
        raise CheckpointError(f"{place}: {error.strerror or first_line(error)}") from error
    except Exception as error:  # constructors raise any type
        raise CheckpointError(f"{folder}: transformers can't load this model: {first_line(error)}") from error


def refuse_incomplete(info: dict[str, Any]) -> None:
    """Raises `CheckpointError` if transformers initialised a parameter itself because no tensor fits.

    Args:
        info: transformers' loading info.
    """
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise CheckpointError(f"{name}: the checkpoint has shape {list(stored)}, the model expects {list(expected)}")
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"the checkpoint has no tensor for {missing[0]}{more}; is it complete?")
    if errors := info.get("error_msgs"):
        raise CheckpointError(f"the checkpoint can't be loaded: {str(errors[0]).splitlines()[0]}")


def first_line(error: BaseException) -> str:
    """First line of an error's message; the name of its type if that is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def find_experts(model: PreTrainedModel) -> list[tuple[ExpertsModule, nn.Module]]:
    """The model's experts modules, in the order of `named_modules`.

    An experts module is one whose class is decorated by transformers' experts registry. Its parameters `[E, ..]` are
    routed; others (a norm that all experts share) are not.

    Raises:
        UnsupportedModelError: there are none.
    """
    found = []
    for name, module in model.named_modules():
        experts = getattr(module, "num_experts", None)
        if not hasattr(type(module).forward, "__wrapped__") or not hasattr(module, "is_transposed") or not experts:
            continue
        own = {key: p for key, p in module.named_parameters(recurse=False) if p.dim() > 1 and p.shape[0] == experts}
        if own:
            source = model.all_tied_weights_keys.get(f"{name}.{next(iter(own))}")
            found.append((ExpertsModule(name, experts, own, source and source.rpartition(".")[0]), module))
    if not found:
        reason = (
            "its experts are not covered by transformers' experts registry"
            if _mentions_experts(model.config)
            else "it is a dense model, without routed experts"
        )
        raise UnsupportedModelError(f"{type(model).__name__} can't be offloaded: {reason}")
    return found


def parameter_dtypes(described: ExpertsModule) -> dict[str, torch.dtype]:
    """Dtypes that an experts module computes in, by parameter."""
    return {name: parameter.dtype for name, parameter in described.parameters.items()}


def _mentions_experts(config: PreTrainedConfig) -> bool:
    """Whether a config has any number of experts above 1."""

    def counts(value: object, key: str = "") -> bool:
        if isinstance(value, dict):
            return any(counts(inner, str(name)) for name, inner in value.items())
        return "expert" in key and isinstance(value, int) and value > 1

    return counts(config.to_dict())


def active_experts(config: PreTrainedConfig) -> int:
    """`K`: experts per token, the largest of any layer; 1 if the config has no such field."""
    active = 1
    parts = [config, config.get_text_config(), *(getattr(config, key, None) for key in config.sub_configs)]
    for part in parts:
        if part is None:
            continue
        for layer in part.per_layer_config if getattr(part, "is_heterogeneous", False) else [part]:
            for name in _ACTIVE:
                value = getattr(layer, name, None)
                values = value if isinstance(value, list) else [value]
                active = max([active, *(v for v in values if isinstance(v, int))])
    return active


def context_tokens(config: PreTrainedConfig) -> int | None:
    """Context length in tokens, prompt and answer together; `None` if the config gives no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or None


def pool_slots(
    expert_index: ExpertIndex, config: PreTrainedConfig, expert_memory: str, slot_bytes: int
) -> tuple[int, int]:
    """Pool size `C` for a memory budget, and the smallest possible one, both in experts.

    Raises:
        BudgetError: the budget is below the smallest possible pool: one token's experts of one layer, and a spare slot.
    """
    slots = parse_budget(expert_memory).slots(slot_bytes, expert_index.experts)
    least = min(active_experts(config) + IN_FLIGHT_SLOTS, expert_index.experts)
    if slots < least:
        raise BudgetError(
            f"--expert-memory: {expert_memory} holds {slots} of {expert_index.experts} experts; at least {least} are "
            f"needed for one step: {least * slot_bytes} bytes ({format_bytes(least * slot_bytes)})"
        )
    return slots, least


class ForwardPass(NamedTuple):
    """A forward pass that is about to run."""

    mask: Tensor | None  # attention mask [B, past + S]; None if it was not given, or has another form
    first: bool  # the KV cache is empty: the pass starts new requests


def read_pass(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> ForwardPass:
    """Reads the arguments of a model's forward pre-hook."""
    given = inspect.signature(module.forward).bind_partial(*arguments, **keywords).arguments
    given |= given.pop("kwargs", {})
    mask, past = given.get("attention_mask"), given.get("past_key_values")
    return ForwardPass(
        mask=mask if isinstance(mask, Tensor) and mask.dim() == 2 else None,
        first=past is None or not hasattr(past, "get_seq_length") or past.get_seq_length() == 0,
    )
