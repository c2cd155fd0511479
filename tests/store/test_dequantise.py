"""Restoring quantized parameters: in parts as at once, into one piece of memory."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import finemoe.store.quantization
from finemoe.checkpoint import Field, LayerLayout, Quantized
from finemoe.store.quantization import Dequantizer, scratch_bytes

BLOCK = 4


def blocks(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Weights `[R, C]` and one scale for each block of rows `[R / 4, 1]`."""
    data, scale = pieces
    return (data.float() * scale.repeat_interleave(BLOCK, dim=0)).to(dtype)


def packed(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The same, and the result the other way round: `[C, R]`."""
    return blocks(pieces, dtype).T.contiguous()


def layout(shape: tuple[int, int], *, turned: bool, transposed: bool) -> LayerLayout:
    rows, columns = shape
    wanted = (columns, rows) if turned != transposed else (rows, columns)
    quantized = Quantized(
        "w",
        wanted,
        "blocks",
        ("w.data", "w.scale"),
        packed if turned else blocks,
        transposed,
        rows // BLOCK,
        int(turned),
    )
    fields = (
        Field("w.data", shape, shape, torch.int8, rows * columns),
        Field("w.scale", (rows // BLOCK, 1), (rows // BLOCK, 1), torch.float32, rows),
    )
    return LayerLayout("m", 1, fields, ((0, rows * columns),), rows * columns + rows, (quantized,))


@given(
    grid=st.integers(1, 7), columns=st.integers(1, 5), items=st.integers(1, 200), turned=st.booleans(),
    transposed=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_parts_are_the_whole(grid: int, columns: int, items: int, turned: bool, transposed: bool, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    shape = grid * BLOCK, columns
    stored = {
        "w.data": torch.randint(-128, 128, shape, generator=draw, dtype=torch.int8),
        "w.scale": torch.rand(grid, 1, generator=draw),
    }
    whole = blocks(list(stored.values()), torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finemoe.store.quantization, "_PART_ITEMS", items)
        got = Dequantizer().restore(layout(shape, turned=turned, transposed=transposed), stored, {"w": torch.bfloat16})
    assert torch.equal(got["w"], whole.T if turned != transposed else whole)
    assert got["w"].is_contiguous()


def test_memory_is_used_again_in_every_mode() -> None:
    dequantizer, made = Dequantizer(), layout((8, 3), turned=False, transposed=False)
    stored = {"w.data": torch.ones(8, 3, dtype=torch.int8), "w.scale": torch.ones(2, 1)}
    with torch.inference_mode():
        first = dequantizer.restore(made, stored, {"w": torch.float32})["w"].data_ptr()
    again = dequantizer.restore(made, stored, {"w": torch.float32})["w"]
    assert again.data_ptr() == first
    assert not again.requires_grad
    assert scratch_bytes([made, made], torch.float32) == again.nbytes
