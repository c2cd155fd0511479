"""Where a GGUF model's experts lie, in the terms of every other checkpoint: an `ExpertIndex`.

An expert is one contiguous stretch of each of its layer's expert tensors. Its slot holds the pages that lie wholly
within these stretches; the pages in which two experts meet belong to the dense part.
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

Layer = Sequence[ExpertTensor]  # the expert tensors that one MoE layer computes with
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def index_experts(layers: Sequence[Layer]) -> ExpertIndex:
    """The index of MoE layers; of each, the slot's pages of every expert."""
    layouts: list[LayerLayout] = []
    ranges: dict[ExpertId, tuple[ByteRange, ...]] = {}
    for number, layer in enumerate(layers):
        for expert in range(layer[0].experts):
            ranges[ExpertId(number, expert)] = tuple(whole_pages(layer, expert))
        layouts.append(_layout(layer, [ranges[ExpertId(number, expert)] for expert in range(layer[0].experts)]))
    return ExpertIndex(layouts, ranges)


def group_by_block(tensors: Sequence[ExpertTensor]) -> list[Layer]:
    """The MoE layers by tensor name: the input of `index_experts` when no graph is available."""
    groups: dict[tuple[int, str], list[ExpertTensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.block, tensor.kind), []).append(tensor)
    return list(groups.values())


def whole_pages(layer: Layer, expert: int) -> Iterator[ByteRange]:
    """The whole pages of an expert's stretches, and their place in a slot."""
    slot_offset_bytes = 0
    for tensor in layer:
        start = tensor.offset_bytes(expert)
        first = -(-start // PAGE_BYTES) * PAGE_BYTES
        length = (start + tensor.expert_bytes) // PAGE_BYTES * PAGE_BYTES - first
        if length > 0:
            yield ByteRange(tensor.info.file, first, length, slot_offset_bytes)
            slot_offset_bytes += length


def dense_ranges(tensors: Sequence[ExpertTensor], file: int, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Of the bytes `start` to `end` of a file, what belongs to no expert alone; in order, as starts and ends."""
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
        dtype: Any = kind or "uint8"  # its name: torch is not needed for these models
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
