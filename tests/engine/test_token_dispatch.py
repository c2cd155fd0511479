"""Token dispatch: rows are grouped as transformers' eager experts group them, and one token needs no grouping."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from finemoe.engine.token_dispatch import BatchDispatch, SingleTokenDispatch, dispatch_tokens, group_rows


@given(st.integers(0, 6), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_rows_are_grouped_as_eager_groups_them(tokens: int, active: int, experts: int, seed: int) -> None:
    index = torch.randint(0, experts + 1, (tokens, active), generator=torch.Generator().manual_seed(seed))
    groups = group_rows(index, experts)
    mask = torch.nn.functional.one_hot(index, experts + 1).permute(2, 1, 0)  # [E + 1, K, T], as transformers does
    expected = {e: torch.where(mask[e]) for e in range(experts) if mask[e].any()}
    assert list(groups) == list(expected)
    for expert, (ks, ts) in expected.items():
        assert torch.equal(groups[expert][0], ks)
        assert torch.equal(groups[expert][1], ts)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("index", [[4, 0, 2], [8, 1, 9], [8, 8, 8], [3, 3, 1]])
def test_a_single_token_is_dispatched_as_a_batch_of_one(index: list[int], weights_dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden, weights = (
        torch.randn(1, 32, generator=generator).bfloat16(),
        torch.rand(1, 3, generator=generator).to(weights_dtype),
    )
    given_inputs = hidden, torch.tensor([index]), weights, 8
    single, batch = dispatch_tokens(*given_inputs), BatchDispatch(*given_inputs)
    assert isinstance(single, SingleTokenDispatch) == (index in ([4, 0, 2], [8, 1, 9]))
    assert single.experts == batch.experts
    sums = [torch.full((1, 32), 0.1, dtype=torch.bfloat16) for _ in range(2)]
    for expert in single.experts:
        for dispatch, total in zip((single, batch), sums, strict=True):
            x, scale = dispatch.rows(expert)
            dispatch.add(total, expert, (x.square() * scale).bfloat16())
    assert torch.equal(*sums)


def test_an_unaligned_token_is_copied() -> None:
    """A matmul may round differently on an unaligned vector."""
    memory = torch.arange(65.0)
    for hidden in (memory[1:].view(1, -1), memory[:64].view(32, 2).T[:1]):
        dispatch = dispatch_tokens(hidden, torch.tensor([[0]]), torch.ones(1, 1), 8)
        assert isinstance(dispatch, BatchDispatch)
        x, _ = dispatch.rows(0)
        assert torch.equal(x, hidden) and x.data_ptr() % 64 == 0 and x.is_contiguous()
