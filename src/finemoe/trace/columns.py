"""The tables of a trace: which columns there are, what each counts, and how a row of it looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from finemoe.trace.header import TraceHeader


@dataclass(frozen=True, slots=True)
class Column:
    """One column: `[count, *shape]` of `dtype`, where `count` is that of its `table`."""

    name: str
    table: str  # "request", "iteration" or "token"
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


def columns(header: TraceHeader) -> tuple[Column, ...]:
    """The columns of a trace with this header, widest items first, so that each is aligned in a file."""
    layers, experts, active = header.layers, header.experts, header.active
    half = np.dtype(np.float16)
    every = (
        Column("iterations", "request", np.dtype(np.int64), ()),
        Column("batch", "request", np.dtype(np.int32), ()),
        Column("rows", "iteration", np.dtype(np.int32), ()),
        Column("token_ids", "token", np.dtype(np.int32), ()),
        Column("weights", "token", half, (layers, active)),
        Column("probs", "token", half, (layers, experts)),
        Column("lookahead", "token", half, (header.lookahead, layers, experts)),
        Column("embeddings", "iteration", half, (header.width,)),
        Column("expert_ids", "token", header.id_dtype, (layers, active)),
        Column("phases", "iteration", np.dtype(np.uint8), ()),
    )
    chosen = [column for column in every if column.name not in header.missing]
    return tuple(sorted(chosen, key=lambda column: -column.dtype.itemsize))
