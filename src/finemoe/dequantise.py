"""Restores quantised parameters on use, into memory that is allocated once and written again for every expert."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from finemoe.checkpoint import LayerLayout, Quantised

# weights restored at once on a CPU: what the operation allocates on the way stays small, and in the cache
_PART_ITEMS = 1 << 17


class Dequantiser:
    """Holds one restored expert for each kind of layer. What it returns is valid until the next call.

    Not safe to use from several threads.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, tuple[int, ...], torch.dtype, torch.device], Tensor] = {}

    def restore(
        self, layout: LayerLayout, stored: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
    ) -> dict[str, Tensor]:
        """The quantised parameters of one expert, as its module wants them.

        Args:
            stored: the expert's fields by name.
            dtypes: of the module's parameters, by name.
        """
        return {q.name: self._restore(q, [stored[name] for name in q.fields], dtypes[q.name]) for q in layout.quantised}

    def _restore(self, quantised: Quantised, pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        device = pieces[0].device
        key = quantised.name, quantised.shape, dtype, device
        output = self._buffers.get(key)
        if output is None:
            with torch.inference_mode(mode=False):  # an inference tensor could not be written to outside that mode
                output = self._buffers[key] = torch.empty(quantised.shape, dtype=dtype, device=device)
        with torch.no_grad():
            as_stored = output.T if quantised.transposed else output
            for part in range(0, quantised.parts, step := _parts_at_once(quantised, device)):
                end = min(part + step, quantised.parts)
                cut = [piece[_share(piece, part, quantised) : _share(piece, end, quantised)] for piece in pieces]
                restored = quantised.dequantise(cut, dtype)
                rows = as_stored.shape[quantised.axis] // quantised.parts
                as_stored.narrow(quantised.axis, part * rows, (end - part) * rows).copy_(restored)
        return output


def scratch_bytes(layouts: Iterable[LayerLayout], dtype: torch.dtype) -> int:
    """What a `Dequantiser` holds for these layouts, beyond the slots and however many those are."""
    kinds = {(q.name, q.shape) for layout in layouts for q in layout.quantised}
    return sum(torch.Size(shape).numel() * dtype.itemsize for _, shape in kinds)


def _parts_at_once(quantised: Quantised, device: torch.device) -> int:
    if device.type != "cpu":  # few large kernels rather than many small ones
        return quantised.parts
    return max(1, _PART_ITEMS * quantised.parts // torch.Size(quantised.shape).numel())


def _share(piece: Tensor, part: int, quantised: Quantised) -> int:
    """First row of the part with this number."""
    return piece.shape[0] // quantised.parts * part
