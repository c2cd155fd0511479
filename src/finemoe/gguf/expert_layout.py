"""Builds the `ExpertIndex` of a GGUF model.

An expert is one contiguous byte range in each of its layer's expert tensors. Its slot holds the pages that lie entirely
within these ranges; pages shared by two experts belong to the dense part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NoReturn

from finemoe.checkpoint import ExpertIndex
from finemoe.checkpoint.expert_index import PAGE_BYTES, Field, LayerLayout, QuantizedParameter
from finemoe.errors import InvariantError
from finemoe.gguf.file import ExpertTensor
from finemoe.types import ByteRange, ExpertId

Layer = Sequence[ExpertTensor]  # the expert tensors of one MoE layer
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def index_experts(layers: Sequence[Layer]) -> ExpertIndex:
    """The index of these MoE layers: for each expert, the whole pages that its slot holds."""
    layouts: list[LayerLayout] = []
    ranges: dict[ExpertId, tuple[ByteRange, ...]] = {}
    for number, layer in enumerate(layers):
        for expert in range(layer[0].experts):
            ranges[ExpertId(number, expert)] = tuple(whole_pages(layer, expert))
        layouts.append(_layout(layer, [ranges[ExpertId(number, expert)] for expert in range(layer[0].experts)]))
    return ExpertIndex(layouts, ranges)


def group_by_block(tensors: Sequence[ExpertTensor]) -> list[Layer]:
    """Group expert tensors into MoE layers by name: the input of `index_experts` when no graph is available."""
    groups: dict[tuple[int, str], list[ExpertTensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.block, tensor.kind), []).append(tensor)
    return list(groups.values())


def whole_pages(layer: Layer, expert: int) -> Iterator[ByteRange]:
    """An expert's whole pages in each tensor, with their offsets in its slot."""
    slot_offset_bytes = 0
    for tensor in layer:
        start = tensor.offset_bytes(expert)
        first = -(-start // PAGE_BYTES) * PAGE_BYTES
        length = (start + tensor.expert_bytes) // PAGE_BYTES * PAGE_BYTES - first
        if length > 0:
            yield ByteRange(tensor.info.file, first, length, slot_offset_bytes)
            slot_offset_bytes += length


def dense_ranges(tensors: Sequence[ExpertTensor], file: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The parts of `[start, end)` of a file that are in no expert's whole pages: (start, end) pairs in order."""
    held = sorted(
        (each.file_offset_bytes, each.file_offset_bytes + each.length_bytes)
        for tensor in tensors
        if tensor.info.file == file
        for expert in range(tensor.experts)
        for each in whole_pages([tensor], expert)
    )
    for (_, before), (after, _) in pairwise([(start, start), *held, (end, end)]):
        if before < min(after, end):
            yield max(before, start), min(after, end)


def _layout(layer: Layer, ranges: Sequence[Sequence[ByteRange]]) -> LayerLayout:
    first = layer[0]
    fields, quantized = [], []
    for tensor in layer:
        name = tensor.info.name.removeprefix(f"blk.{tensor.block}.")
        columns, rows, _ = tensor.info.shape
        kind = _PLAIN.get(tensor.info.type)
        stored_shape = (rows, columns) if kind is not None else (rows, tensor.expert_bytes // rows)
        dtype: Any = kind or "uint8"  # a name, so that torch is not imported
        fields.append(Field(name, (rows, columns), stored_shape, dtype, tensor.expert_bytes))
        if kind is None:
            quantized.append(QuantizedParameter(name, (rows, columns), tensor.info.type, (name,), _not_here))
    return LayerLayout(
        module=f"blk.{first.block}.{first.kind}",
        experts=first.experts,
        fields=tuple(fields),
        offsets_bytes=tuple(tuple(each.slot_offset_bytes for each in own) for own in ranges),
        length_bytes=max(PAGE_BYTES, *(sum(each.length_bytes for each in own) for own in ranges)),
        quantized=tuple(quantized),
    )


def _not_here(*_: object) -> NoReturn:
    raise InvariantError("the library computes with quantized experts as they are stored")
