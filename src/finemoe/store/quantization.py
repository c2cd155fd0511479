"""int8 and int4 quantization of experts with torchao, and dequantization on use. One scale per group of a row."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from finemoe.checkpoint import LayerLayout, QuantizedParameter
from finemoe.checkpoint.expert_index import Dequantize
from finemoe.errors import ConfigError

_MIN_GROUP = 16
_PART_ITEMS = 1 << 17  # weights dequantized at once on a CPU: bounds temporary memory, and keeps it in the cache


@dataclass(frozen=True)
class Scheme:
    """A quantization scheme.

    Attributes:
        name: as in `--expert-dtype`.
        bits: 8 (symmetric) or 4 (with a zero point, two weights per byte).
        group: how many consecutive weights of a row share a scale; less where the row does not divide evenly.
    """

    name: str
    bits: int
    group: int

    def pieces(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]] | None:
        """Shape and dtype of the tensors that one expert's parameter is stored as, by name.

        `None` if it is not quantized: not a matrix, or too narrow.
        """
        if len(shape) != 2 or self._group(shape) < _MIN_GROUP or shape[1] * self.bits % 8:
            return None
        rows, columns = shape
        grid = rows, columns // self._group(shape)
        if self.bits == 8:
            return {"data": (shape, torch.int8), "scale": (grid, torch.float32)}
        return {
            "data": ((rows, columns // 2), torch.uint8),
            "scale": (grid, torch.float32),
            "zero": (grid, torch.uint8),
        }

    def quantize(self, weights: Tensor) -> tuple[Tensor, ...]:
        """Quantize a matrix `[R, C]`. Returns its tensors in the order of `pieces`."""
        from torchao.quantization import MappingType, choose_qparams_affine, quantize_affine

        weights = weights.float()
        block = 1, self._group(tuple(weights.shape))
        if self.bits == 8:
            kind, limits = MappingType.SYMMETRIC, (torch.int8, -128, 127)
        else:
            kind, limits = MappingType.ASYMMETRIC, (torch.uint8, 0, 15)
        scale, zero = choose_qparams_affine(weights, kind, block, *limits, scale_dtype=torch.float32)
        data = quantize_affine(weights, block, scale, zero, *limits)
        grid = weights.shape[0], weights.shape[1] // block[1]
        if self.bits == 8:
            return data, scale.reshape(grid)
        packed = data[:, 0::2] | (data[:, 1::2] << 4)
        return packed, scale.reshape(grid), zero.to(torch.uint8).reshape(grid)

    def dequantize_as(self, shape: tuple[int, ...]) -> Dequantize:
        """A function that dequantizes rows of a matrix of this shape."""
        return partial(_dequantize_int8 if self.bits == 8 else _dequantize_int4, group=self._group(shape))

    def _group(self, shape: tuple[int, ...]) -> int:
        """`group`, halved until it divides a row."""
        group = self.group
        while shape[-1] % group:
            group //= 2
        return group


SCHEMES = {"int8": Scheme("int8", 8, 128), "int4": Scheme("int4", 4, 64)}


def _dequantize_int8(pieces: Sequence[Tensor], dtype: torch.dtype, *, group: int) -> Tensor:
    from torchao.quantization import dequantize_affine

    data, scale = pieces
    restored: Tensor = dequantize_affine(data, (1, group), scale, None, torch.int8, -128, 127, output_dtype=dtype)
    return restored


def _dequantize_int4(pieces: Sequence[Tensor], dtype: torch.dtype, *, group: int) -> Tensor:
    from torchao.quantization import dequantize_affine

    packed, scale, zero = pieces
    data = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    restored: Tensor = dequantize_affine(data, (1, group), scale, zero, torch.uint8, 0, 15, output_dtype=dtype)
    return restored


def require_torchao() -> None:
    """Raises `ConfigError` where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError("--expert-dtype: torchao is not installed; pip install 'finemoe[quantized]'")


class Dequantizer:
    """Dequantizes one expert at a time into buffers that it reuses: one for each parameter's name, shape and dtype.

    Returned tensors are valid until the next call. Not thread-safe.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, tuple[int, ...], torch.dtype, torch.device], Tensor] = {}

    def restore(
        self, layout: LayerLayout, stored: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, Tensor]:
        """Dequantize the quantized parameters of one expert, by name, in the module's layout.

        Args:
            layout: of the expert's layer.
            stored: the expert's fields by name.
            dtypes: of the module's parameters, by name.
        """
        return {q.name: self._restore(q, [stored[name] for name in q.fields], dtypes[q.name]) for q in layout.quantized}

    def _restore(self, quantized: QuantizedParameter, pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        device = pieces[0].device
        key = quantized.name, quantized.shape, dtype, device
        output = self._buffers.get(key)
        if output is None:
            with torch.inference_mode(mode=False):  # inference tensors can't be written to outside that mode
                output = self._buffers[key] = torch.empty(quantized.shape, dtype=dtype, device=device)
        with torch.no_grad():
            as_stored = output.T if quantized.transposed else output
            for part in range(0, quantized.parts, step := _parts_at_once(quantized, device)):
                end = min(part + step, quantized.parts)
                chunk = [piece[_start(piece, part, quantized) : _start(piece, end, quantized)] for piece in pieces]
                restored = quantized.dequantize(chunk, dtype)
                rows = as_stored.shape[quantized.axis] // quantized.parts
                as_stored.narrow(quantized.axis, part * rows, (end - part) * rows).copy_(restored)
        return output


def scratch_bytes(layouts: Iterable[LayerLayout], dtype: torch.dtype) -> int:
    """Size of a `Dequantizer`'s buffers for these layouts; memory beyond the slots, whatever their number."""
    buffers = {(q.name, q.shape) for layout in layouts for q in layout.quantized}
    return sum(torch.Size(shape).numel() * dtype.itemsize for _, shape in buffers)


def _parts_at_once(quantized: QuantizedParameter, device: torch.device) -> int:
    if device.type != "cpu":  # on a GPU, few large kernels are faster than many small ones
        return quantized.parts
    return max(1, _PART_ITEMS * quantized.parts // torch.Size(quantized.shape).numel())


def _start(piece: Tensor, part: int, quantized: QuantizedParameter) -> int:
    """First row of the part with this number."""
    return piece.shape[0] // quantized.parts * part
