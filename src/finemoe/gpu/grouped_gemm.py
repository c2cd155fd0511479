"""Resident experts in one grouped matmul: transformers' own `grouped_mm` way, over slots instead of experts.

A token's results are kept apart, one row for each (token, k), and added up when all are there, in the order of k. So
the sum does not depend on what was resident; the matmuls do not either where `agrees` has tried it.
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

MOST_GROUPS = 1000  # of torch's kernel: below 1024
_FEW = 64  # indices that plain Python is through with before numpy has begun
Indices = npt.NDArray[np.int64]


def stack_slots(memory: Tensor, layout: LayerLayout) -> dict[str, Tensor]:
    """A device's slots, uint8 `[C, slot_bytes]`, as one tensor `[C, ..]` for each parameter. Shared, not copied."""
    return {
        field.name: memory[:, offset_bytes : offset_bytes + field.length_bytes]
        .view(field.dtype)
        .unflatten(1, field.shape)
        for field, offset_bytes in zip(layout.fields, layout.offsets_bytes[0], strict=True)
    }


def rows_of_experts(ids: Tensor, experts: int) -> dict[int, Sequence[int] | Indices]:
    """Which (token, k) pairs, as `token * K + k`, each expert computes; ids `[T, K]` of `experts` or more: nobody's."""
    if ids.numel() <= _FEW:  # decoding
        few: dict[int, list[int]] = {}
        for pair, expert in enumerate(ids.reshape(-1).tolist()):
            if 0 <= expert < experts:
                few.setdefault(expert, []).append(pair)
        return {expert: few[expert] for expert in sorted(few)}
    flat = ids.reshape(-1).numpy()
    pairs = np.argsort(flat, kind="stable")
    hit, starts = np.unique(flat[pairs], return_index=True)
    rows = np.split(pairs, starts[1:])
    return {int(expert): row for expert, row in zip(hit, rows, strict=True) if 0 <= expert < experts}


def windows(slots: Sequence[int]) -> Iterator[slice]:
    """Ascending slots in stretches of those that lie close enough for one matmul."""
    start = 0
    for end in range(1, len(slots) + 1):
        if end == len(slots) or slots[end] - slots[start] >= MOST_GROUPS:
            yield slice(start, end)
            start = end


class Groups(NamedTuple):
    """Which rows go through which slots, as a grouped matmul wants it. Tensors on the slots' device."""

    span: slice  # of the slots
    ends: Tensor  # int32: for each slot of the span, where its rows end
    owner: Tensor  # int64 [n]: the slot of each row

    def to(self, device: torch.device) -> Groups:
        return Groups(self.span, self.ends.to(device), self.owner.to(device))


def plan_groups(
    rows: Sequence[tuple[int, Sequence[int] | Indices]], active: int, upload: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor, Groups]:
    """All that a grouped matmul must be told, in one upload.

    Args:
        rows: slot and (token, k) pairs of each expert, slots ascending, less than `MOST_GROUPS` apart.
        active: `K`.
        upload: brings a host tensor to the device.

    Returns:
        The pairs, sorted by slot, and their tokens, int64 `[n]`; and the groups.
    """
    slots, counts = [slot for slot, _ in rows], [len(pairs) for _, pairs in rows]
    first, last = slots[0], slots[-1] + 1
    pairs = np.concatenate([pairs for _, pairs in rows])
    sizes = np.zeros(last - first, np.int64)
    sizes[np.subtract(slots, first)] = counts
    parts = pairs, pairs // active, np.repeat(slots, counts), sizes.cumsum()
    plan = upload(torch.from_numpy(np.concatenate(parts)))
    chosen, tokens, owner, ends = plan.split([len(part) for part in parts])
    return chosen, tokens, Groups(slice(first, last), ends.to(torch.int32), owner)


def apply_experts(module: Any, stacks: dict[str, Tensor], x: Tensor, groups: Groups) -> Tensor:
    """Several experts, each on its own rows of `[n, D]`, by the module's layout attributes."""
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
    return x.add_(stacks[f"{name}_bias"][groups.owner]) if module.has_bias else x
