"""Where every expert lies: file, offset, bytes, dtype and shape of each piece. Reads headers, never weights."""

from finemoe.checkpoint.catalog import Catalog, Field, LayerLayout, Quantised
from finemoe.checkpoint.headers import TensorHeader, read_headers
from finemoe.checkpoint.locate import Checkpoint, locate

__all__ = ["Catalog", "Checkpoint", "Field", "LayerLayout", "Quantised", "TensorHeader", "locate", "read_headers"]
