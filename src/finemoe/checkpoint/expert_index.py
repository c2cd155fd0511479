"""The expert index: which byte ranges of which files make up each expert's slot.

It is built by running transformers' own `WeightConverter`s on tensors of *addresses* instead of weights, so that every
checkpoint layout that transformers can load (per expert or fused, one shard or many) is handled by the code that
defines it. There is one address per row: weights `[.., R, C]` become int64 `[.., R, 1]`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, TypeAlias

from finemoe.errors import CheckpointError, UnsupportedModelError
from finemoe.types import ByteRange, ExpertId

if TYPE_CHECKING:
    import torch  # imported where it is used: a GGUF model needs none of it

ALIGN_BYTES = 64  # alignment of torch's own allocator
PAGE_BYTES = 4096
PLACED_BYTES = 16 * PAGE_BYTES  # a parameter at least this long keeps its offset within a page of its file
_ALIGNED = ("torch.float32", "torch.float64")  # on some CPUs MKL's order of summation depends on a matrix's alignment
_MINOR_SHARE = 0.1  # dtypes with a smaller share of an expert's bytes (a bias) are left out of `stored_dtype`
_MANY_BREAKS = 8  # a parameter whose rows have more jumps in the file than this is read in file order
_FILE_SHIFT = 44  # an address is file << 44 | offset, so files may have up to 16 TiB
_OFFSET_MASK = (1 << _FILE_SHIFT) - 1


@dataclass(frozen=True, eq=False)
class Field:
    """One parameter of one expert, as it is stored in a slot, and how to restore it.

    Attributes:
        name: of the parameter in the experts module; or of one of a quantized parameter's tensors.
        shape: that the module expects.
        stored_shape: of the slot's bytes.
        dtype: of the slot's bytes.
        transposed: the checkpoint stores the matrix transposed.
        order: `[rows]` int64, the slot's rows in the module's order; `None` where they are in that order.
    """

    name: str
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    dtype: torch.dtype
    length_bytes: int
    transposed: bool = False
    order: torch.Tensor | None = None

    @property
    def in_place(self) -> bool:
        """Whether the module can compute on the slot's bytes without a copy."""
        return not self.transposed and self.order is None

    def restore(self, stored: torch.Tensor) -> torch.Tensor:
        """The parameter in the module's layout, from the stored tensor; a copy unless `in_place`."""
        if self.order is not None:
            stored = stored[self.order]
        if self.transposed:
            stored = stored.T.contiguous()
        return stored.reshape(self.shape)


Dequantize: TypeAlias = "Callable[[Sequence[torch.Tensor], torch.dtype], torch.Tensor]"


@dataclass(frozen=True, eq=False)
class QuantizedParameter:
    """One parameter of an experts module that is stored quantized, in several fields, and how to dequantize it.

    Attributes:
        name: of the parameter.
        shape: that the module expects.
        method: name of the quantization method.
        fields: names of its fields, in the order in which `dequantize` takes their tensors.
        dequantize: makes the parameter, in a given dtype, of its fields' tensors.
        transposed: the checkpoint stores the matrix transposed.
        parts: the tensors may be split into up to so many equal parts along their first dimension, and dequantized
            part by part.
        axis: along which the parts' results are concatenated.
    """

    name: str
    shape: tuple[int, ...]
    method: str
    fields: tuple[str, ...]
    dequantize: Dequantize
    transposed: bool = False
    parts: int = 1
    axis: int = 0


@dataclass(frozen=True, eq=False)
class LayerLayout:
    """How the experts of one MoE layer are laid out in their slots.

    A large parameter keeps the offset within a page that it has in its file, so that whole pages are read directly into
    the slot. Where arithmetic depends on alignment, a parameter has the same one, modulo 64 bytes, as in the stacked
    tensor that transformers makes. Offsets therefore differ between experts.

    Attributes:
        module: name of the experts module.
        experts: how many it has.
        fields: parameters of the module, and the tensors of `quantized` parameters.
        offsets_bytes: `[E][field]`, where each of an expert's fields starts in its slot.
        length_bytes: of the longest expert, padding included.
        quantized: parameters that are stored quantized.
    """

    module: str
    experts: int
    fields: tuple[Field, ...]
    offsets_bytes: tuple[tuple[int, ...], ...]
    length_bytes: int
    quantized: tuple[QuantizedParameter, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """Bytes of one expert without padding."""
        return sum(field.length_bytes for field in self.fields)

    def stored_as(self, field: Field) -> str:
        """What a field's bytes are: the name of a quantization method, or a dtype."""
        methods = {name: quantized.method for quantized in self.quantized for name in quantized.fields}
        return methods.get(field.name, str(field.dtype).removeprefix("torch."))

    @property
    def stored_dtype(self) -> str:
        """An expert's stored dtype or quantization method; several are joined by `+`."""
        parts: Counter[str] = Counter()
        for field in self.fields:
            parts[self.stored_as(field)] += field.length_bytes
        return "+".join(name for name, length in parts.most_common() if length >= _MINOR_SHARE * self.weight_bytes)


class ExpertIndex:
    """The layouts and byte ranges of all experts of a checkpoint.

    Args:
        layouts: `[L]`, of the MoE layers in the order in which the model runs them.
        byte_ranges: of every expert.
    """

    def __init__(self, layouts: Sequence[LayerLayout], byte_ranges: Mapping[ExpertId, tuple[ByteRange, ...]]) -> None:
        self.layouts = tuple(layouts)
        self._byte_ranges = dict(byte_ranges)

    def byte_ranges(self, expert: ExpertId) -> tuple[ByteRange, ...]:
        """Where the bytes of `expert` are in the files, and where they go in its slot."""
        return self._byte_ranges[expert]

    @property
    def experts(self) -> int:
        """Number of routed experts, all layers together."""
        return sum(layout.experts for layout in self.layouts)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all routed experts, without padding."""
        return sum(layout.experts * layout.weight_bytes for layout in self.layouts)

    @property
    def stored_dtype(self) -> str:
        """Stored dtype or quantization method of the experts; several, with commas, where layers differ."""
        return ", ".join(dict.fromkeys(layout.stored_dtype for layout in self.layouts))

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot: the largest expert, rounded up to whole pages unless experts are tiny."""
        largest = max(layout.length_bytes for layout in self.layouts)
        return round_up(largest, PAGE_BYTES if largest >= PLACED_BYTES else ALIGN_BYTES)


@dataclass(frozen=True, eq=False)
class Addresses:
    """The addresses of one parameter's stored rows, for all experts: int64 `[E, rows]`."""

    rows: torch.Tensor
    row_bytes: int
    stored_shape: tuple[int, ...]
    transposed: bool


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


def address_rows(file: int, offset_bytes: int, shape: Sequence[int], item_bytes: int) -> torch.Tensor:
    """Addresses of the rows of a stored tensor: int64 `[.., R, 1]` for `[.., R, C]`."""
    *outer, columns = shape
    import torch

    rows = torch.arange(int(torch.Size(outer).numel()), dtype=torch.int64) * (columns * item_bytes)
    return (rows + (file << _FILE_SHIFT) + offset_bytes).reshape(*outer, 1)


def address_items(file: int, offset_bytes: int, shape: Sequence[int], item_bytes: int) -> torch.Tensor:
    """Addresses of the elements of a stored tensor: int64 of its shape. For small tensors only."""
    import torch

    items = torch.arange(int(torch.Size(shape).numel()), dtype=torch.int64) * item_bytes
    return (items + (file << _FILE_SHIFT) + offset_bytes).reshape(*shape)


def stored_rows(name: str, shape: Sequence[int], addresses: torch.Tensor, columns: int, item_bytes: int) -> Addresses:
    """Where the rows of a parameter are stored, from the converter's result.

    Args:
        name: of the parameter.
        shape: of the parameter, `[E, R, C]`.
        addresses: the converter's result.
        columns: elements per row of the checkpoint's tensors.
        item_bytes: bytes per element.

    Raises:
        CheckpointError: the checkpoint has another number of weights for it.
        UnsupportedModelError: the conversion is neither a selection of rows nor a transposition.
    """
    experts, rows, width = shape
    if addresses.shape == (experts, rows, 1) and columns == width:
        return Addresses(addresses.reshape(experts, rows), width * item_bytes, (rows, width), transposed=False)
    if addresses.shape == (experts, 1, width) and columns == rows:
        return Addresses(addresses.reshape(experts, width), rows * item_bytes, (width, rows), transposed=True)
    if addresses.numel() * columns != experts * rows * width:
        raise CheckpointError(
            f"{name}: the checkpoint has {addresses.numel() * columns} weights for it, the model expects {list(shape)}"
        )
    raise UnsupportedModelError(
        f"{name}: transformers converts this checkpoint's experts in a way that finemoe does not support"
    )


def stored_items(name: str, shape: Sequence[int], addresses: torch.Tensor, item_bytes: int) -> Addresses:
    """Like `stored_rows`, for addresses of elements: any rearrangement of a small parameter `[E, ..]`."""
    if addresses.shape != tuple(shape):
        raise CheckpointError(
            f"{name}: the checkpoint gives shape {list(addresses.shape)}, the model expects {list(shape)}"
        )
    return Addresses(addresses.reshape(shape[0], -1), item_bytes, tuple(shape[1:]), transposed=False)


class LayerBuilder:
    """Collects the parameters of one experts module and lays out its slots."""

    def __init__(self, layer: int, module: str, experts: int) -> None:
        self._layer = layer
        self._module = module
        self._experts = experts
        self._fields: list[Field] = []
        self._offsets: list[list[int]] = [[] for _ in range(experts)]
        self._quantized: list[QuantizedParameter] = []
        self._byte_ranges: list[list[ByteRange]] = [[] for _ in range(experts)]
        self._ends = [0] * experts  # end of each expert's bytes so far

    def add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, stored: Addresses) -> None:
        """Append a parameter, of one expert's `shape`, whose rows are at `stored`."""
        import torch

        rows = stored.rows
        order = None
        if _most_breaks(rows, stored.row_bytes) > _MANY_BREAKS:
            ranked = torch.sort(rows, dim=1)  # one long read in file order instead of many short ones
            rows, order = ranked.values, _common_order(f"{self._module}.{name}", ranked.indices)
        length_bytes = rows.shape[1] * stored.row_bytes
        if order is not None and len(order) != stored.stored_shape[0]:  # elements, not rows: flattened
            stored_shape: tuple[int, ...] = (len(order), 1)
        else:
            stored_shape = stored.stored_shape
        self._fields.append(Field(name, shape, stored_shape, dtype, length_bytes, stored.transposed, order))
        for expert in range(self._experts):
            byte_ranges = _join(rows[expert], stored.row_bytes)
            stacked = expert * length_bytes % ALIGN_BYTES
            offset_bytes = _place(self._ends[expert], byte_ranges, length_bytes, dtype, stacked)
            self._offsets[expert].append(offset_bytes)
            self._byte_ranges[expert].extend(
                replace(each, slot_offset_bytes=each.slot_offset_bytes + offset_bytes) for each in byte_ranges
            )
            self._ends[expert] = offset_bytes + length_bytes

    def add_quantized(self, quantized: QuantizedParameter) -> None:
        """Append a quantized parameter, whose fields were added before."""
        self._quantized.append(quantized)

    def build(self) -> tuple[LayerLayout, dict[ExpertId, tuple[ByteRange, ...]]]:
        """The layer's layout, and the byte ranges of its experts."""
        offsets_bytes = tuple(map(tuple, self._offsets))
        layout = LayerLayout(
            self._module,
            self._experts,
            tuple(self._fields),
            offsets_bytes,
            max(self._ends),
            tuple(self._quantized),
        )
        return layout, {ExpertId(self._layer, e): tuple(ranges) for e, ranges in enumerate(self._byte_ranges)}


def _place(
    end_bytes: int, byte_ranges: Sequence[ByteRange], length_bytes: int, dtype: torch.dtype, stacked: int
) -> int:
    """Where a parameter starts in a slot: after `end_bytes`, at the offset within a page that most of its bytes have.

    Args:
        end_bytes: end of the parameter before.
        byte_ranges: of the parameter; slot offsets count from its own start.
        length_bytes: of the parameter.
        dtype: of the parameter.
        stacked: this expert's offset in the stacked tensor of all experts, modulo `ALIGN_BYTES`.
    """
    if length_bytes >= PLACED_BYTES:
        fits: Counter[int] = Counter()
        for each in byte_ranges:
            fits[(each.file_offset_bytes - each.slot_offset_bytes) % PAGE_BYTES] += each.length_bytes
        place = fits.most_common(1)[0][0]
        if place % ALIGN_BYTES == stacked if str(dtype) in _ALIGNED else place % dtype.itemsize == 0:
            return end_bytes + (place - end_bytes) % PAGE_BYTES
    return end_bytes + (stacked - end_bytes) % ALIGN_BYTES


def _most_breaks(rows: torch.Tensor, row_bytes: int) -> int:
    """How often the file position jumps within one expert; the maximum over experts."""
    return int((rows[:, 1:] - rows[:, :-1] != row_bytes).sum(dim=1).max())


def _common_order(name: str, ranks: torch.Tensor) -> torch.Tensor | None:
    """The permutation from file order back to the module's order; `None` if they are the same.

    Args:
        ranks: int64 `[E, rows]`, the argsort of each expert's addresses.
    """
    import torch

    if not bool((ranks == ranks[0]).all()):
        raise UnsupportedModelError(f"{name}: the checkpoint stores the rows of its experts in different orders")
    if bool((ranks[0] == torch.arange(ranks.shape[1])).all()):
        return None
    return torch.argsort(ranks[0])


def _join(addresses: torch.Tensor, row_bytes: int) -> list[ByteRange]:
    """Row addresses of one expert's parameter, merged into as few byte ranges as possible."""
    import torch

    breaks = (torch.nonzero(addresses[1:] - addresses[:-1] != row_bytes).flatten() + 1).tolist()
    bounds = [0, *breaks, len(addresses)]
    byte_ranges = []
    for start, end in pairwise(bounds):
        address = int(addresses[start])
        byte_ranges.append(
            ByteRange(
                address >> _FILE_SHIFT,
                address & _OFFSET_MASK,
                (end - start) * row_bytes,
                start * row_bytes,
            )
        )
    return byte_ranges
