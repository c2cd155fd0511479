"""Mean token embeddings from the model's embedding table, an input to policies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from finemoe.gguf.address_space import view
from finemoe.gguf.file import TensorInfo


class EmbeddingTable:
    """A model's token embeddings, in their stored type.

    Args:
        info: the tensor's header entry.
        address: memory address of the tensor's first byte.
    """

    def __init__(self, info: TensorInfo, address: int) -> None:
        from gguf import GGMLQuantizationType

        columns, rows = info.shape[:2]
        self._type = GGMLQuantizationType[info.type]
        self._rows = np.frombuffer(view(address, info.size_bytes), np.uint8).reshape(rows, info.size_bytes // rows)
        self.width = columns

    def mean(self, tokens: Sequence[int]) -> npt.NDArray[np.float32] | None:
        """The mean embedding of `tokens`, `[D]`; `None` if the stored type can't be dequantized."""
        from gguf.quants import dequantize

        try:
            rows = dequantize(self._rows[np.asarray(tokens, np.int64)], self._type)
        except NotImplementedError:
            return None
        mean: npt.NDArray[np.float32] = rows.mean(axis=0, dtype=np.float32)
        return mean
