"""Several experts in one grouped matmul, as transformers' `grouped_mm` experts do it, over slots instead of experts.

Each (token, k) pair has a result row of its own; a token's rows are added up once all are there, in the order of k. So
the sum does not depend on what was resident. Nor do the matmuls, where `grouped_is_exact` has checked that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the name that torch users know

from finemoe.checkpoint import LayerLayout

MAX_GROUPS = 1000  # per matmul; torch's kernel takes fewer than 1024
_MAX_PYTHON_INDICES = 64  # up to so many, plain Python is faster than numpy
_Indices = npt.NDArray[np.int64]


def stack_slots(memory: Tensor, layout: LayerLayout) -> dict[str, Tensor]:
    """A device's slots, uint8 `[C, slot_bytes]`, as one tensor `[C, ..]` per parameter, by name. Views, not copies."""
    return {
        field.name: memory[:, offset_bytes : offset_bytes + field.length_bytes]
        .view(field.dtype)
        .unflatten(1, field.shape)
        for field, offset_bytes in zip(layout.fields, layout.offsets_bytes[0], strict=True)
    }


def group_pairs(index: Tensor, experts: int) -> dict[int, Sequence[int] | _Indices]:
    """The (token, k) pairs that each expert computes, as `token * K + k`, experts ascending.

    Args:
        index: executed experts `[T, K]`, in host memory; entries `>= experts` are ignored.
        experts: `E`.
    """
    if index.numel() <= _MAX_PYTHON_INDICES:  # decoding
        few: dict[int, list[int]] = {}
        for pair, expert in enumerate(index.reshape(-1).tolist()):
            if 0 <= expert < experts:
                few.setdefault(expert, []).append(pair)
        return {expert: few[expert] for expert in sorted(few)}
    flat = index.reshape(-1).numpy()
    pairs = np.argsort(flat, kind="stable")
    hit, starts = np.unique(flat[pairs], return_index=True)
    rows = np.split(pairs, starts[1:])
    return {int(expert): row for expert, row in zip(hit, rows, strict=True) if 0 <= expert < experts}


def split_slots(slots: Sequence[int]) -> Iterator[slice]:
    """Splits ascending slots into parts that span at most `MAX_GROUPS` slots each, for one matmul."""
    start = 0
    for end in range(1, len(slots) + 1):
        if end == len(slots) or slots[end] - slots[start] >= MAX_GROUPS:
            yield slice(start, end)
            start = end


class Groups(NamedTuple):
    """The groups of one grouped matmul: one per slot of `span`, empty ones included. Tensors on the slots' device."""

    span: slice  # of the device's slots
    ends: Tensor  # int32, for each slot of the span: end of its rows
    row_slots: Tensor  # int64 [n]: the slot of each row

    def to(self, device: torch.device) -> Groups:
        return Groups(self.span, self.ends.to(device), self.row_slots.to(device))


def plan_groups(
    rows: Sequence[tuple[int, Sequence[int] | _Indices]], active: int, upload: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Groups]:
    """The indices of one grouped matmul, in one upload.

    Args:
        rows: slot and (token, k) pairs of each expert; slots ascending, spanning at most `MAX_GROUPS`.
        active: `K`.
        upload: copies a host tensor to the device.

    Returns:
        The pairs, in the order of slots, and their tokens, int64 `[n]`; and the groups.
    """
    slots, counts = [slot for slot, _ in rows], [len(pairs) for _, pairs in rows]
    first, last = slots[0], slots[-1] + 1
    pairs = np.concatenate([pairs for _, pairs in rows])
    sizes = np.zeros(last - first, np.int64)
    sizes[np.subtract(slots, first)] = counts
    parts = pairs, pairs // active, np.repeat(slots, counts), sizes.cumsum()
    plan = upload(torch.from_numpy(np.concatenate(parts)))
    ordered, tokens, row_slots, ends = plan.split([len(part) for part in parts])
    return ordered, tokens, Groups(slice(first, last), ends.to(torch.int32), row_slots)


def apply_experts(module: Any, stacks: dict[str, Tensor], x: Tensor, groups: Groups) -> Tensor:
    """The outputs `[n, D]` of several experts for their rows `[n, D]`, by the module's layout attributes.

    Args:
        module: the experts module.
        stacks: all slots as parameters `[C, ..]`, by name.
        x: rows in the order of slots.
        groups: of `plan_groups`.
    """
    up = "gate_up_proj" if module.has_gate else "up_proj"
    x = _project(module, stacks, up, x, groups)
    x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
    x = _project(module, stacks, "down_proj", x, groups)
    return module.post_expert_norm(x) if getattr(module, "has_post_expert_norm", False) else x


def _project(module: Any, stacks: dict[str, Tensor], name: str, x: Tensor, groups: Groups) -> Tensor:
    weight = stacks[name][groups.span]
    if not module.is_transposed:
        weight = weight.transpose(-2, -1)
    x = F.grouped_mm(x.to(weight.dtype), weight, offs=groups.ends)
    return x.add_(stacks[f"{name}_bias"][groups.row_slots]) if module.has_bias else x
