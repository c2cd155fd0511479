"""Checkpoints that are stored quantized: which of them transformers restores, and how it is asked to."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer

from finemoe.checkpoint import ExpertIndex, TensorHeader
from finemoe.errors import ConfigError, UnsupportedModelError

# methods whose weights transformers restores while loading, on any machine, and the library that it asks for then
RESTORED = {"fp8": "accelerate", "mxfp4": None}

_QUANTIZED = {"F8_E4M3", "F8_E5M2"}


def method_of(settings: Any) -> str:
    """The quantization method that a config's `quantization_config` names."""
    return str(settings.get("quant_method", "unknown")) if isinstance(settings, dict) else "unknown"


def refuse_unrestored(folder: Path, settings: Any) -> None:
    """Raises `UnsupportedModelError` for a method that can't be followed, `ConfigError` where a library is missing."""
    method = method_of(settings)
    if method not in RESTORED:
        raise UnsupportedModelError(
            f"{folder} is quantized ({method}), which transformers can't restore expert by expert; "
            f"take the model's {' or '.join(RESTORED)} release, or an unquantized one with --expert-dtype"
        )
    library = RESTORED[method]
    if library is not None and importlib.util.find_spec(library) is None:
        raise ConfigError(f"--model: {folder} is quantized ({method}); to load it, pip install 'finemoe[quantized]'")


def restore_on_load(config: PreTrainedConfig) -> None:
    """Asks transformers for restored weights: what its own quantized modules compute is not exact, nor portable."""
    for part in (config, config.get_text_config(decoder=True)):
        settings = getattr(part, "quantization_config", None)
        if isinstance(settings, dict):
            part.quantization_config = settings | {"dequantize": True}


def refuse_unasked(quantizer: Any) -> None:
    """Raises `UnsupportedModelError` where transformers restores no weights although it was asked to."""
    if quantizer is not None and not getattr(quantizer.quantization_config, "dequantize", False):
        method = quantizer.quantization_config.quant_method
        raise UnsupportedModelError(f"transformers keeps this model quantized ({getattr(method, 'value', method)})")


def quantizer_of(config: PreTrainedConfig) -> Any:
    """What transformers has for a quantized checkpoint, `None` for others."""
    for part in (config, config.get_text_config(decoder=True)):
        if (settings := getattr(part, "quantization_config", None)) is not None:
            return AutoHfQuantizer.from_config(settings, pre_quantized=True)
    return None


def restored_bytes(headers: Iterable[TensorHeader], dtype: torch.dtype) -> int:
    """What dense tensors take in memory: quantized ones are restored at once."""
    return sum(
        prod(header.shape) * dtype.itemsize if header.dtype in _QUANTIZED else header.length_bytes for header in headers
    )


def refuse_on_devices(expert_index: ExpertIndex) -> None:
    """Raises `ConfigError` for quantized experts: devices' slots hold parameters as modules want them."""
    if any(layout.quantized for layout in expert_index.layouts):
        raise ConfigError(
            f"--device: experts stored as {expert_index.stored_dtype} are computed on the CPU only so far; "
            "give --device cpu"
        )


def refuse_uncast(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Raises `ConfigError` where transformers left a parameter in the checkpoint's dtype, and not in that asked for.

    It casts no tensor that its dequantization might take, whether that does or not: such a model can't run.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtypes[name]:
            stored = str(parameter.dtype).removeprefix("torch.")
            raise ConfigError(
                f"--dtype: this quantized checkpoint is restored in {stored} only ({name}); leave --dtype out"
            )
