"""Where every expert lies: file, offset, bytes, dtype and shape of each piece. Reads headers, never weights."""

from finemoe.checkpoint.expert_index import ExpertIndex, Field, LayerLayout, Quantized
from finemoe.checkpoint.headers import TensorHeader, read_headers
from finemoe.checkpoint.locate import Checkpoint, locate

__all__ = ["Checkpoint", "ExpertIndex", "Field", "LayerLayout", "Quantized", "TensorHeader", "locate", "read_headers"]
