"""Finds a checkpoint and indexes its experts: file, offset, bytes, dtype and shape. Reads headers, never weights."""

from finemoe.checkpoint.expert_index import ExpertIndex, Field, LayerLayout, QuantizedParameter
from finemoe.checkpoint.headers import TensorHeader, read_headers
from finemoe.checkpoint.locate import Checkpoint, locate

__all__ = [
    "Checkpoint",
    "ExpertIndex",
    "Field",
    "LayerLayout",
    "QuantizedParameter",
    "TensorHeader",
    "locate",
    "read_headers",
]
