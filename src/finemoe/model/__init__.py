"""Loads models with their experts left out, and describes them without loading."""

from finemoe.model.describe import Description, describe
from finemoe.model.handle import ModelHandle, OffloadedModel
from finemoe.model.introspect import active_experts, context_tokens, find_experts, model_class, read_config
from finemoe.model.load import chosen_model, load, load_config, reference_model

__all__ = [
    "Description",
    "ModelHandle",
    "OffloadedModel",
    "active_experts",
    "chosen_model",
    "context_tokens",
    "describe",
    "find_experts",
    "load",
    "load_config",
    "model_class",
    "read_config",
    "reference_model",
]
