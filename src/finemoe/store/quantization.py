"""How a matrix becomes small integers, and back: torchao's routines, with one scale for a group of weights in a row."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from finemoe.checkpoint import LayerLayout, Quantized
from finemoe.checkpoint.expert_index import Dequantize
from finemoe.errors import ConfigError

_LEAST_GROUP = 16


@dataclass(frozen=True)
class Scheme:
    """A way to quantize. `group` is how many neighbours of a row share a scale, where the row divides so."""

    name: str
    bits: int
    group: int

    def pieces(self, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]] | None:
        """What one expert's parameter is stored as, by name; `None` if it stays as it is: a vector, or too narrow."""
        if len(shape) != 2 or self._group(shape) < _LEAST_GROUP or shape[1] * self.bits % 8:
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
        """The pieces of a matrix `[R, C]`, in the order of `pieces`."""
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
        """What restores whole rows of a matrix of this shape."""
        return partial(_eight if self.bits == 8 else _four, group=self._group(shape))

    def _group(self, shape: tuple[int, ...]) -> int:
        """The largest power-of-two part of `group` that divides a row."""
        group = self.group
        while shape[-1] % group:
            group //= 2
        return group


SCHEMES = {"int8": Scheme("int8", 8, 128), "int4": Scheme("int4", 4, 64)}


def _eight(pieces: Sequence[Tensor], dtype: torch.dtype, *, group: int) -> Tensor:
    from torchao.quantization import dequantize_affine

    data, scale = pieces
    restored: Tensor = dequantize_affine(data, (1, group), scale, None, torch.int8, -128, 127, output_dtype=dtype)
    return restored


def _four(pieces: Sequence[Tensor], dtype: torch.dtype, *, group: int) -> Tensor:
    from torchao.quantization import dequantize_affine

    packed, scale, zero = pieces
    data = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)
    restored: Tensor = dequantize_affine(data, (1, group), scale, zero, torch.uint8, 0, 15, output_dtype=dtype)
    return restored


def require_torchao() -> None:
    """Raises `ConfigError` where torchao is not installed."""
    if importlib.util.find_spec("torchao") is None:
        raise ConfigError("--expert-dtype: torchao is not installed; pip install 'finemoe[quantized]'")


# weights restored at once on a CPU: what the operation allocates on the way stays small, and in the cache
_PART_ITEMS = 1 << 17


class Dequantizer:
    """Holds one restored expert for each kind of layer. What it returns is valid until the next call.

    Not safe to use from several threads.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, tuple[int, ...], torch.dtype, torch.device], Tensor] = {}

    def restore(
        self, layout: LayerLayout, stored: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, Tensor]:
        """The quantized parameters of one expert, as its module wants them.

        Args:
            stored: the expert's fields by name.
            dtypes: of the module's parameters, by name.
        """
        return {q.name: self._restore(q, [stored[name] for name in q.fields], dtypes[q.name]) for q in layout.quantized}

    def _restore(self, quantized: Quantized, pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        device = pieces[0].device
        key = quantized.name, quantized.shape, dtype, device
        output = self._buffers.get(key)
        if output is None:
            with torch.inference_mode(mode=False):  # an inference tensor could not be written to outside that mode
                output = self._buffers[key] = torch.empty(quantized.shape, dtype=dtype, device=device)
        with torch.no_grad():
            as_stored = output.T if quantized.transposed else output
            for part in range(0, quantized.parts, step := _parts_at_once(quantized, device)):
                end = min(part + step, quantized.parts)
                cut = [piece[_share(piece, part, quantized) : _share(piece, end, quantized)] for piece in pieces]
                restored = quantized.dequantize(cut, dtype)
                rows = as_stored.shape[quantized.axis] // quantized.parts
                as_stored.narrow(quantized.axis, part * rows, (end - part) * rows).copy_(restored)
        return output


def scratch_bytes(layouts: Iterable[LayerLayout], dtype: torch.dtype) -> int:
    """What a `Dequantizer` holds for these layouts, beyond the slots and however many those are."""
    kinds = {(q.name, q.shape) for layout in layouts for q in layout.quantized}
    return sum(torch.Size(shape).numel() * dtype.itemsize for _, shape in kinds)


def _parts_at_once(quantized: Quantized, device: torch.device) -> int:
    if device.type != "cpu":  # few large kernels rather than many small ones
        return quantized.parts
    return max(1, _PART_ITEMS * quantized.parts // torch.Size(quantized.shape).numel())


def _share(piece: Tensor, part: int, quantized: Quantized) -> int:
    """First row of the part with this number."""
    return piece.shape[0] // quantized.parts * part
