"""int8 and int4 quantization: bounded error, and dequantization in parts into a reused buffer."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import finemoe.store.quantization
from finemoe.checkpoint import Field, LayerLayout, QuantizedParameter
from finemoe.store.quantization import SCHEMES, Dequantizer, Scheme, scratch_bytes

with_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
SHAPES = st.tuples(st.integers(1, 9), st.sampled_from([16, 48, 64, 96, 128, 192, 320]))
BLOCK = 4


@with_torchao
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
@given(shape=SHAPES, seed=st.integers(0, 99), size=st.sampled_from([1e-6, 0.02, 300.0]))
def test_the_error_is_at_most_half_a_step(scheme: Scheme, shape: tuple[int, int], seed: int, size: float) -> None:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    pieces = scheme.quantize(weights)
    planned = scheme.pieces(shape)
    assert planned is not None
    assert [(tuple(piece.shape), piece.dtype) for piece in pieces] == list(planned.values())
    restored = scheme.dequantize_as(shape)(pieces, torch.float32)
    grid = pieces[1]
    steps = grid.repeat_interleave(shape[1] // grid.shape[1], dim=1)
    # int8 is symmetric and has no code for the largest positive value: its error is up to half a step more
    assert bool(((restored - weights).abs() <= 1.001 * steps).all())
    assert float((restored - weights).abs().mean()) <= 0.51 * float(steps.mean())


@with_torchao
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
@given(rows=st.integers(2, 9), cut=st.integers(1, 8))
def test_rows_can_be_dequantized_separately(scheme: Scheme, rows: int, cut: int) -> None:
    shape = rows, 96
    pieces = scheme.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(rows)))
    dequantize = scheme.dequantize_as(shape)
    parts = [dequantize([piece[part] for piece in pieces], torch.bfloat16) for part in (slice(cut), slice(cut, None))]
    expected = dequantize(pieces, torch.bfloat16)
    assert torch.equal(torch.cat([part for part in parts if part.numel()]), expected)


@pytest.mark.parametrize("shape", [(64,), (8, 64, 2), (8, 7), (64, 8)])
def test_vectors_and_narrow_matrices_are_not_quantized(shape: tuple[int, ...]) -> None:
    assert all(scheme.pieces(shape) is None for scheme in SCHEMES.values())


def blocks(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Dequantizes weights `[R, C]` with one scale for each block of rows `[R / 4, 1]`."""
    data, scale = pieces
    return (data.float() * scale.repeat_interleave(BLOCK, dim=0)).to(dtype)


def blocks_transposed(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The same, transposed: `[C, R]`."""
    return blocks(pieces, dtype).T.contiguous()


def layout(shape: tuple[int, int], *, result_transposed: bool, transposed: bool) -> LayerLayout:
    rows, columns = shape
    module_shape = (columns, rows) if result_transposed != transposed else (rows, columns)
    quantized = QuantizedParameter(
        "w",
        module_shape,
        "blocks",
        ("w.data", "w.scale"),
        blocks_transposed if result_transposed else blocks,
        transposed,
        rows // BLOCK,
        int(result_transposed),
    )
    fields = (
        Field("w.data", shape, shape, torch.int8, rows * columns),
        Field("w.scale", (rows // BLOCK, 1), (rows // BLOCK, 1), torch.float32, rows),
    )
    return LayerLayout("m", 1, fields, ((0, rows * columns),), rows * columns + rows, (quantized,))


@given(
    grid=st.integers(1, 7), columns=st.integers(1, 5), items=st.integers(1, 200), result_transposed=st.booleans(),
    transposed=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_dequantizing_part_by_part_gives_the_same(
    grid: int, columns: int, items: int, result_transposed: bool, transposed: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    shape = grid * BLOCK, columns
    stored = {
        "w.data": torch.randint(-128, 128, shape, generator=draw, dtype=torch.int8),
        "w.scale": torch.rand(grid, 1, generator=draw),
    }
    expected = blocks(list(stored.values()), torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finemoe.store.quantization, "_PART_ITEMS", items)
        got = Dequantizer().restore(
            layout(shape, result_transposed=result_transposed, transposed=transposed), stored, {"w": torch.bfloat16}
        )
    assert torch.equal(got["w"], expected.T if result_transposed != transposed else expected)
    assert got["w"].is_contiguous()


def test_the_buffer_is_reused_in_every_grad_mode() -> None:
    dequantizer, its_layout = Dequantizer(), layout((8, 3), result_transposed=False, transposed=False)
    stored = {"w.data": torch.ones(8, 3, dtype=torch.int8), "w.scale": torch.ones(2, 1)}
    with torch.inference_mode():
        first = dequantizer.restore(its_layout, stored, {"w": torch.float32})["w"].data_ptr()
    again = dequantizer.restore(its_layout, stored, {"w": torch.float32})["w"]
    assert again.data_ptr() == first
    assert not again.requires_grad
    assert scratch_bytes([its_layout, its_layout], torch.float32) == again.nbytes
