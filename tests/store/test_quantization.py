"""How experts are quantized: close to the weights, and row by row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finemoe.store.quantization import SCHEMES, Scheme

pytest.importorskip("torchao")

SHAPES = st.tuples(st.integers(1, 9), st.sampled_from([16, 48, 64, 96, 128, 192, 320]))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
@given(shape=SHAPES, seed=st.integers(0, 99), size=st.sampled_from([1e-6, 0.02, 300.0]))
def test_what_comes_back_is_within_half_a_step(scheme: Scheme, shape: tuple[int, int], seed: int, size: float) -> None:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    pieces = scheme.quantize(weights)
    planned = scheme.pieces(shape)
    assert planned is not None
    assert [(tuple(piece.shape), piece.dtype) for piece in pieces] == list(planned.values())
    restored = scheme.dequantize_as(shape)(pieces, torch.float32)
    grid = pieces[1]
    steps = grid.repeat_interleave(shape[1] // grid.shape[1], dim=1)
    # a symmetric grid of eight bits has no step for the largest positive value: it is cut by half a step more
    assert bool(((restored - weights).abs() <= 1.001 * steps).all())
    assert float((restored - weights).abs().mean()) <= 0.51 * float(steps.mean())


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda scheme: scheme.name)
@given(rows=st.integers(2, 9), cut=st.integers(1, 8))
def test_rows_are_restored_by_themselves(scheme: Scheme, rows: int, cut: int) -> None:
    shape = rows, 96
    pieces = scheme.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(rows)))
    restore = scheme.dequantize_as(shape)
    parts = [restore([piece[part] for piece in pieces], torch.bfloat16) for part in (slice(cut), slice(cut, None))]
    whole = restore(pieces, torch.bfloat16)
    assert torch.equal(torch.cat([part for part in parts if part.numel()]), whole)


@pytest.mark.parametrize("shape", [(64,), (8, 64, 2), (8, 7), (64, 8)])
def test_vectors_and_narrow_matrices_stay_as_they_are(shape: tuple[int, ...]) -> None:
    assert all(scheme.pieces(shape) is None for scheme in SCHEMES.values())
