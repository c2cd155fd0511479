"""The catalog: for every expert, which stretches of which files make up its slot.

It is derived by running transformers' own `WeightConverter`s on tensors that hold *addresses* instead of weights, so
that every checkpoint layout which transformers can load (per expert or fused, one shard or many) is understood by the
code that defines it. Addresses stand for rows: a tensor `[.., R, C]` of weights becomes `[.., R, 1]` of int64.
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

ALIGN_BYTES = 64  # of a tensor's start: what torch's own allocator gives
PAGE_BYTES = 4096
PLACED_BYTES = 16 * PAGE_BYTES  # a parameter this long keeps its place within a page of its file
_ALIGNED = ("torch.float32", "torch.float64")  # MKL's sums depend, on some CPUs, on where a matrix of these starts
_MINOR_SHARE = 0.1  # of an expert's bytes; what takes less (a bias) does not count for what it is stored as
_MANY_BREAKS = 8  # jumps in one parameter's rows beyond which they are read in file order instead
_FILE_SHIFT = 44  # an address is file << 44 | offset: 16 TiB a file
_OFFSET_MASK = (1 << _FILE_SHIFT) - 1


@dataclass(frozen=True, eq=False)
class Field:
    """One parameter of an experts module, for one expert, as its bytes lie in a slot.

    `stored_shape` and `dtype` describe the slot's bytes. The module expects `shape`; the way from one to the other is
    `order` (rows of the slot in the order in which the module wants them, when the checkpoint has them in another)
    and `transposed` (the checkpoint stores the matrix the other way round).
    """

    name: str
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    dtype: torch.dtype
    length_bytes: int
    transposed: bool = False
    order: torch.Tensor | None = None  # int64 [rows]

    @property
    def in_place(self) -> bool:
        """Whether the module can compute on the slot's own bytes."""
        return not self.transposed and self.order is None

    def restore(self, stored: torch.Tensor) -> torch.Tensor:
        """The parameter as the module wants it, out of what the checkpoint stores; a copy unless `in_place`."""
        if self.order is not None:
            stored = stored[self.order]
        if self.transposed:
            stored = stored.T.contiguous()
        return stored.reshape(self.shape)


Dequantize: TypeAlias = "Callable[[Sequence[torch.Tensor], torch.dtype], torch.Tensor]"


@dataclass(frozen=True, eq=False)
class Quantized:
    """One parameter of an experts module that is stored quantized, in several fields, and the way back.

    `dequantize` makes of the fields' tensors, in their order, the parameter in a dtype; `transposed` if the checkpoint
    stores it the other way round. The tensors may be cut into up to `parts` equal parts along their first dimension:
    the parts' results, put together along dimension `axis`, are the whole's.
    """

    name: str
    shape: tuple[int, ...]
    form: str  # what people call this way of storing weights
    fields: tuple[str, ...]
    dequantize: Dequantize
    transposed: bool = False
    parts: int = 1
    axis: int = 0


@dataclass(frozen=True, eq=False)
class LayerLayout:
    """What all experts of one MoE layer have in common, and where in a slot each keeps its parameters.

    Large parameters keep the place within a page that they have in their file, so that whole pages are read straight
    into the slot; where arithmetic depends on it, they start as far behind a multiple of 64 bytes as in the stacked
    tensor that transformers makes. Experts differ in that; `offsets_bytes` `[expert]` has, for each of `fields`, its
    start in the slot.
    A field is a parameter of the module, or belongs to one of `quantized`.
    """

    module: str  # name of the experts module
    experts: int
    fields: tuple[Field, ...]
    offsets_bytes: tuple[tuple[int, ...], ...]
    length_bytes: int  # of the longest expert, padding included
    quantized: tuple[Quantized, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """Bytes of one expert without padding."""
        return sum(field.length_bytes for field in self.fields)

    def stored_as(self, field: Field) -> str:
        """What a field's bytes are: the name of a quantized form, or a dtype."""
        forms = {name: quantized.form for quantized in self.quantized for name in quantized.fields}
        return forms.get(field.name, str(field.dtype).removeprefix("torch."))

    @property
    def stored_dtype(self) -> str:
        """What an expert is stored as: a dtype or the name of a quantized form; more than one with `+` between."""
        parts: Counter[str] = Counter()
        for field in self.fields:
            parts[self.stored_as(field)] += field.length_bytes
        return "+".join(name for name, length in parts.most_common() if length >= _MINOR_SHARE * self.weight_bytes)


class ExpertIndex:
    """All MoE layers of a checkpoint. Layers count from 0 in the order in which the model runs them."""

    def __init__(self, layouts: Sequence[LayerLayout], runs: Mapping[ExpertId, tuple[ByteRange, ...]]) -> None:
        self.layouts = tuple(layouts)
        self._runs = dict(runs)

    def byte_ranges(self, expert: ExpertId) -> tuple[ByteRange, ...]:
        return self._runs[expert]

    @property
    def experts(self) -> int:
        """Routed experts of the whole model."""
        return sum(layout.experts for layout in self.layouts)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all routed experts."""
        return sum(layout.experts * layout.weight_bytes for layout in self.layouts)

    @property
    def stored_dtype(self) -> str:
        """What experts are stored as; more than one where layers differ."""
        return ", ".join(dict.fromkeys(layout.stored_dtype for layout in self.layouts))

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot: the largest expert; whole pages unless experts are tiny."""
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
    """The least multiple of `multiple` that is not below `value`."""
    return -(-value // multiple) * multiple


def address_rows(file: int, offset_bytes: int, shape: Sequence[int], item_bytes: int) -> torch.Tensor:
    """Addresses of the rows of a stored tensor: int64 `[.., R, 1]` for `[.., R, C]`."""
    *outer, columns = shape
    import torch

    rows = torch.arange(int(torch.Size(outer).numel()), dtype=torch.int64) * (columns * item_bytes)
    return (rows + (file << _FILE_SHIFT) + offset_bytes).reshape(*outer, 1)


def address_items(file: int, offset_bytes: int, shape: Sequence[int], item_bytes: int) -> torch.Tensor:
    """Addresses of the single elements of a stored tensor: int64 of its shape. For small tensors only."""
    import torch

    items = torch.arange(int(torch.Size(shape).numel()), dtype=torch.int64) * item_bytes
    return (items + (file << _FILE_SHIFT) + offset_bytes).reshape(*shape)


def stored_rows(name: str, shape: Sequence[int], addresses: torch.Tensor, columns: int, item_bytes: int) -> Addresses:
    """Reads the converter's result for a parameter `[E, R, C]` whose sources have rows of `columns` elements.

    Raises:
        UnsupportedModelError: the conversion is neither a choice of rows nor a transposition.
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
        f"{name}: transformers converts this checkpoint's experts in a way that finemoe can't follow row by row"
    )


def stored_items(name: str, shape: Sequence[int], addresses: torch.Tensor, item_bytes: int) -> Addresses:
    """Like `stored_rows`, for addresses of single elements: any rearrangement of a small parameter `[E, ..]`."""
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
        self._quantized: list[Quantized] = []
        self._runs: list[list[ByteRange]] = [[] for _ in range(experts)]
        self._ends = [0] * experts  # of each expert's bytes

    def add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, stored: Addresses) -> None:
        """Append a parameter (`shape` is one expert's) whose rows are where `stored` says."""
        import torch

        rows = stored.rows
        order = None
        if _most_breaks(rows, stored.row_bytes) > _MANY_BREAKS:
            ranked = torch.sort(rows, dim=1)  # file order: one long read instead of many short ones
            rows, order = ranked.values, _common_order(f"{self._module}.{name}", ranked.indices)
        length_bytes = rows.shape[1] * stored.row_bytes
        if order is not None and len(order) != stored.stored_shape[0]:  # single elements: flatten, then restore
            stored_shape: tuple[int, ...] = (len(order), 1)
        else:
            stored_shape = stored.stored_shape
        self._fields.append(Field(name, shape, stored_shape, dtype, length_bytes, stored.transposed, order))
        for expert in range(self._experts):
            runs = _join(rows[expert], stored.row_bytes)
            stacked = expert * length_bytes % ALIGN_BYTES
            offset_bytes = _place(self._ends[expert], runs, length_bytes, dtype, stacked)
            self._offsets[expert].append(offset_bytes)
            self._runs[expert].extend(
                replace(run, slot_offset_bytes=run.slot_offset_bytes + offset_bytes) for run in runs
            )
            self._ends[expert] = offset_bytes + length_bytes

    def add_quantized(self, quantized: Quantized) -> None:
        """Say how a parameter is made of fields that were added."""
        self._quantized.append(quantized)

    def build(self) -> tuple[LayerLayout, dict[ExpertId, tuple[ByteRange, ...]]]:
        offsets_bytes = tuple(map(tuple, self._offsets))
        layout = LayerLayout(
            self._module,
            self._experts,
            tuple(self._fields),
            offsets_bytes,
            max(self._ends),
            tuple(self._quantized),
        )
        return layout, {ExpertId(self._layer, e): tuple(runs) for e, runs in enumerate(self._runs)}


def _place(end_bytes: int, runs: Sequence[ByteRange], length_bytes: int, dtype: torch.dtype, stacked: int) -> int:
    """Where in a slot a parameter starts: after `end_bytes`, and where most of its bytes are within a page of the file.

    Args:
        runs: the parameter's stretches, counted from its own start.
        stacked: where all experts' parameters lie in one tensor, this one's start, modulo `ALIGN_BYTES`.
    """
    if length_bytes >= PLACED_BYTES:
        fits: Counter[int] = Counter()
        for run in runs:
            fits[(run.file_offset_bytes - run.slot_offset_bytes) % PAGE_BYTES] += run.length_bytes
        place = fits.most_common(1)[0][0]
        if place % ALIGN_BYTES == stacked if str(dtype) in _ALIGNED else place % dtype.itemsize == 0:
            return end_bytes + (place - end_bytes) % PAGE_BYTES
    return end_bytes + (stacked - end_bytes) % ALIGN_BYTES


def _most_breaks(rows: torch.Tensor, row_bytes: int) -> int:
    """How often the file position jumps within one expert, at worst."""
    return int((rows[:, 1:] - rows[:, :-1] != row_bytes).sum(dim=1).max())


def _common_order(name: str, ranks: torch.Tensor) -> torch.Tensor | None:
    """How to get from file order back to the module's order; `None` if they are the same.

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
    """Row addresses of one expert's parameter, joined into as few stretches as possible, counted from its start."""
    import torch

    breaks = (torch.nonzero(addresses[1:] - addresses[:-1] != row_bytes).flatten() + 1).tolist()
    bounds = [0, *breaks, len(addresses)]
    runs = []
    for start, end in pairwise(bounds):
        address = int(addresses[start])
        runs.append(
            ByteRange(
                address >> _FILE_SHIFT,
                address & _OFFSET_MASK,
                (end - start) * row_bytes,
                start * row_bytes,
            )
        )
    return runs
