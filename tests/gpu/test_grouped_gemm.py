"""Grouped matmuls over slots: rows go to their experts, in whatever slots these are."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F  # noqa: N812 - the name that torch users know

from finemoe.checkpoint import Field, LayerLayout
from finemoe.gpu.grouped_gemm import MAX_GROUPS, apply_experts, group_pairs, plan_groups, split_slots, stack_slots

WIDTH, INNER, SLOTS = 16, 8, 2500
NAMES = {"up_proj": (INNER, WIDTH), "up_proj_bias": (INNER,), "down_proj": (WIDTH, INNER), "down_proj_bias": (WIDTH,)}


def make_layout() -> LayerLayout:
    fields, offsets, end = [], [], 0
    for name, shape in NAMES.items():
        length = 4 * torch.Size(shape).numel()
        fields.append(Field(name, shape, shape, torch.float32, length))
        offsets.append(end)
        end += -(-length // 64) * 64
    return LayerLayout("m", 4, tuple(fields), (tuple(offsets),) * 4, end)


@given(st.sets(st.integers(0, SLOTS - 1), min_size=1, max_size=6), st.integers(1, 40), st.integers(1, 3))
def test_rows_go_through_the_slots_of_their_experts(slots: set[int], tokens: int, active: int) -> None:
    layout = make_layout()
    generator = torch.Generator().manual_seed(tokens)
    memory = torch.zeros(SLOTS, layout.length_bytes, dtype=torch.uint8)
    stacks = stack_slots(memory, layout)
    for name, shape in NAMES.items():
        for slot in slots:
            stacks[name][slot] = torch.randn(shape, generator=generator)
    module = SimpleNamespace(has_gate=False, has_bias=True, is_transposed=False, act_fn=F.relu)
    order = sorted(slots)
    ids = torch.randint(0, len(order) + 1, (tokens, active), generator=generator)  # the last one is ignored
    hidden = torch.randn(tokens, WIDTH, generator=generator)
    rows = group_pairs(ids, len(order))
    output = torch.zeros(tokens * active, WIDTH)
    members = [(order[expert], own) for expert, own in rows.items()]
    for span in split_slots([slot for slot, _ in members]):
        pairs, which, groups = plan_groups(members[span], active, lambda tensor: tensor)
        assert groups.span.stop - groups.span.start <= MAX_GROUPS
        output[pairs] = apply_experts(module, stacks, hidden[which], groups)
    for pair, expert in enumerate(ids.reshape(-1).tolist()):
        if expert == len(order):
            assert not output[pair].any()
            continue
        own = {name: stack[order[expert]] for name, stack in stacks.items()}
        inner = F.relu(F.linear(hidden[pair // active], own["up_proj"], own["up_proj_bias"]))
        expected = F.linear(inner, own["down_proj"], own["down_proj_bias"])
        torch.testing.assert_close(output[pair], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tokens", [3, 100])
def test_few_and_many_indices_are_grouped_alike(tokens: int) -> None:
    ids = torch.randint(0, 6, (tokens, 4), generator=torch.Generator().manual_seed(0))
    rows = group_pairs(ids, 5)
    assert list(rows) == sorted(rows)
    flat = ids.reshape(-1).tolist()
    assert {e: list(own) for e, own in rows.items()} == {
        e: [pair for pair, expert in enumerate(flat) if expert == e] for e in sorted({x for x in flat if x < 5})
    }
