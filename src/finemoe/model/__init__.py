"""Loads transformers models with offloaded experts, and describes them without loading.

`load` and `describe` are in the modules of these names. The other names are imported on first use: torch and
transformers take seconds, and `finemoe.model.reference` needs neither.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finemoe.model.backend import load_config
    from finemoe.model.describe import Description
    from finemoe.model.handle import ModelHandle, OffloadedModel
    from finemoe.model.introspect import context_tokens, model_class, read_config
    from finemoe.model.load import chosen_model, reference_model

__all__ = [
    "Description",
    "ModelHandle",
    "OffloadedModel",
    "chosen_model",
    "context_tokens",
    "load_config",
    "model_class",
    "read_config",
    "reference_model",
]
_MODULES = {
    "Description": "describe",
    "ModelHandle": "handle",
    "OffloadedModel": "handle",
    "chosen_model": "load",
    "context_tokens": "introspect",
    "load_config": "backend",
    "model_class": "introspect",
    "read_config": "introspect",
    "reference_model": "load",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"finemoe.model.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'finemoe.model' has no attribute {name!r}")
