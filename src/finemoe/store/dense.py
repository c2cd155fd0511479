"""Dense weights (all but the routed experts): read once, directly into memory of the process.

transformers asks a checkpoint for lazy slices and reads them in its loader threads. These slices bypass the page cache
instead of mapping the file, so that dense weights are neither in memory twice nor dropped under memory pressure.
"""

from __future__ import annotations

from types import EllipsisType

import torch

from finemoe.checkpoint import TensorHeader
from finemoe.store.direct_io import CHUNK_BYTES, DiskStore
from finemoe.types import ByteRange

_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


class LazyTensor:
    """A tensor of the checkpoint, read on access: the part of safetensors' slices that transformers' loader uses."""

    def __init__(self, store: DiskStore, name: str, header: TensorHeader) -> None:
        self._store = store
        self._name = name
        self._header = header

    def get_shape(self) -> list[int]:
        return list(self._header.shape)

    def get_dtype(self) -> str:
        return self._header.dtype

    def __getitem__(self, index: EllipsisType) -> torch.Tensor:
        """Read the complete tensor; `index` must be `...`.

        Raises:
            OSError: the read failed or came up short; the message names the file.
            TypeError: another index, or a dtype that torch does not have.
        """
        if index is not Ellipsis:
            raise TypeError(f"{self._name}: only whole tensors are read, with [...]")
        header = self._header
        if header.dtype not in _DTYPES:
            raise TypeError(f"{self._name}: can't read a tensor stored as {header.dtype}")
        tensor = torch.empty(header.shape, dtype=_DTYPES[header.dtype])
        if header.length_bytes:
            raw = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
            byte_range = ByteRange(header.file, header.offset_bytes, header.length_bytes, 0)
            for start in range(0, header.length_bytes, CHUNK_BYTES):
                self._store.read(byte_range, start, raw[start : start + CHUNK_BYTES])
        return tensor
