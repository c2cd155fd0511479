"""Quantized checkpoints: which methods are accepted, and how transformers is made to dequantize them."""

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

# methods that transformers dequantizes while loading, on any machine, and the library that it needs for it
RESTORED = {"fp8": "accelerate", "mxfp4": None}

_FLOAT8 = {"F8_E4M3", "F8_E5M2"}  # safetensors dtypes of quantized weights


def refuse_unrestored(folder: Path, settings: Any) -> None:
    """Checks a config's `quantization_config`.

    Raises:
        UnsupportedModelError: a method that transformers can't dequantize expert by expert.
        ConfigError: a library that the method needs is not installed.
    """
    method = str(settings.get("quant_method", "unknown")) if isinstance(settings, dict) else "unknown"
    if method not in RESTORED:
        raise UnsupportedModelError(
            f"{folder} is quantized ({method}), which transformers can't dequantize expert by expert; "
            f"take the model's {' or '.join(RESTORED)} release, or an unquantized one with --expert-dtype"
        )
    library = RESTORED[method]
    if library is not None and importlib.util.find_spec(library) is None:
        raise ConfigError(f"--model: {folder} is quantized ({method}); to load it, pip install 'finemoe[quantized]'")


def restore_on_load(config: PreTrainedConfig) -> None:
    """Makes transformers dequantize at load: its own quantized modules are neither exact nor portable."""
    for part in (config, config.get_text_config(decoder=True)):
        settings = getattr(part, "quantization_config", None)
        if isinstance(settings, dict):
            part.quantization_config = settings | {"dequantize": True}


def refuse_unasked(quantizer: Any) -> None:
    """Raises `UnsupportedModelError` if transformers ignores the request to dequantize."""
    if quantizer is not None and not getattr(quantizer.quantization_config, "dequantize", False):
        method = quantizer.quantization_config.quant_method
        raise UnsupportedModelError(f"transformers keeps this model quantized ({getattr(method, 'value', method)})")


def quantizer_of(config: PreTrainedConfig) -> Any:
    """The transformers quantizer of a quantized checkpoint; `None` for others."""
    for part in (config, config.get_text_config(decoder=True)):
        if (settings := getattr(part, "quantization_config", None)) is not None:
            return AutoHfQuantizer.from_config(settings, pre_quantized=True)
    return None


def restored_bytes(headers: Iterable[TensorHeader], dtype: torch.dtype) -> int:
    """Memory of dense tensors: quantized ones are dequantized to `dtype` at load."""
    return sum(
        prod(header.shape) * dtype.itemsize if header.dtype in _FLOAT8 else header.length_bytes for header in headers
    )


def refuse_on_devices(expert_index: ExpertIndex) -> None:
    """Raises `ConfigError` for quantized experts: slots on devices hold dequantized parameters."""
    if any(layout.quantized for layout in expert_index.layouts):
        raise ConfigError(
            f"--device: experts stored as {expert_index.stored_dtype} are computed on the CPU only so far; "
            "give --device cpu"
        )


def refuse_uncast(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Raises `ConfigError` if transformers left a parameter in the checkpoint's dtype instead of `dtypes`.

    It skips the cast for every tensor that its dequantization could apply to, even if it does not: such a model can't
    run.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype != dtypes[name]:
            stored = str(parameter.dtype).removeprefix("torch.")
            raise ConfigError(
                f"--dtype: this quantized checkpoint is restored in {stored} only ({name}); leave --dtype out"
            )
