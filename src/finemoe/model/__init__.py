"""Loads models with their experts left out, and describes them without loading.

Names are imported on first use: transformers takes seconds and memory, which a GGUF model need not spend. `load` and
`describe` are in the modules of these names.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finemoe.model.backend import load_config
    from finemoe.model.describe import Description
    from finemoe.model.handle import ModelHandle, OffloadedModel
    from finemoe.model.introspect import active_experts, context_tokens, find_experts, model_class, read_config
    from finemoe.model.load import chosen_model, reference_model

_HOMES = {
    "Description": "describe",
    "ModelHandle": "handle",
    "OffloadedModel": "handle",
    "active_experts": "introspect",
    "chosen_model": "load",
    "context_tokens": "introspect",
    "find_experts": "introspect",
    "load_config": "backend",
    "model_class": "introspect",
    "read_config": "introspect",
    "reference_model": "load",
}

__all__ = [
    "Description",
    "ModelHandle",
    "OffloadedModel",
    "active_experts",
    "chosen_model",
    "context_tokens",
    "find_experts",
    "load_config",
    "model_class",
    "read_config",
    "reference_model",
]


def __getattr__(name: str) -> Any:
    """The names above, each imported on first use."""
    if name not in _HOMES:
        raise AttributeError(f"module 'finemoe.model' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"finemoe.model.{_HOMES[name]}"), name)
    return value
