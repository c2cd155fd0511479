"""One request's routing, as read from a trace or on its way into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finemoe.errors import TraceError
from finemoe.trace.columns import columns
from finemoe.trace.header import OPTIONAL, TraceHeader
from finemoe.trace.values import fault

PREFILL, DECODE = 0, 1


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RequestTrace:
    """`I` iterations (a prompt's prefill, then one for each token decoded) of `n` token rows altogether.

    What was not recorded is `None`. Arrays of a trace that was opened are read-only views of its file.
    """

    phases: NDArray[np.uint8]  # [I] 0 prefill, 1 decode
    rows: NDArray[np.int64]  # [I + 1] iteration i is token rows rows[i] to rows[i + 1]
    token_ids: NDArray[np.int32]  # [n]
    expert_ids: NDArray[np.uint8] | NDArray[np.uint16]  # [n, L, K] executed, by weight, descending; then sentinels
    weights: NDArray[np.float16] | None = None  # [n, L, K] as executed, whatever their scale
    probs: NDArray[np.float16] | None = None  # [n, L, E] the gate's distribution
    embeddings: NDArray[np.float16] | None = None  # [I, D] mean of the embedding layer's output over the tokens
    lookahead: NDArray[np.float16] | None = None  # [n, distance, L, E] gate l + 1 + j of the state that gate l saw
    batch: int | None = None  # requests of a batch ran together

    def __len__(self) -> int:
        """Iterations."""
        return len(self.phases)

    def __repr__(self) -> str:
        recorded = ", ".join(name for name in OPTIONAL if getattr(self, name) is not None)
        return f"RequestTrace({len(self)} iterations, {len(self.token_ids)} tokens; {recorded or 'ids only'})"

    def check(self, header: TraceHeader) -> dict[str, NDArray[Any]]:
        """The rows that this request adds to each column.

        Raises:
            TraceError: it does not fit the header; the message names the field.
        """
        for name in OPTIONAL:
            if (getattr(self, name) is None) != (name in header.missing):
                raise TraceError(f"a request {_has(self, name)} {name}, its trace does not agree")
        rows = np.asarray(self.rows, np.int64)
        counts = np.diff(rows)
        if len(rows) != len(self.phases) + 1 or not len(self.phases) or rows[0] or (counts < 1).any():
            raise TraceError("a request's rows must be offsets from 0 on, one more than its iterations, and ascending")
        if not set(np.unique(self.phases).tolist()) <= {PREFILL, DECODE}:
            raise TraceError(f"a request's phases must be {PREFILL} or {DECODE}")
        unit = {"request": 1, "iteration": len(counts), "token": int(rows[-1])}
        given = {"iterations": np.array([len(counts)]), "rows": counts, "batch": np.array([self.batch or 0])}
        table: dict[str, NDArray[Any]] = {}
        for column in columns(header):
            values = given.get(column.name, getattr(self, column.name, None))
            array = np.ascontiguousarray(values)
            expected = (unit[column.table], *column.shape)
            if array.shape != expected:
                raise TraceError(f"a request's {column.name} have shape {array.shape}, not {expected}")
            if array.dtype.kind != column.dtype.kind and (array.dtype.kind, column.dtype.kind) != ("i", "u"):
                raise TraceError(f"a request's {column.name} are {array.dtype}, not {column.dtype}")
            table[column.name] = array.astype(column.dtype, copy=False)
        if not np.array_equal(table["expert_ids"], self.expert_ids):  # a narrower type has made others of them
            raise TraceError(f"a request's expert_ids must be below {header.experts}, or the sentinel")
        _check_values(table, header)
        return table


def _check_values(table: dict[str, NDArray[Any]], header: TraceHeader) -> None:
    for name, array in table.items():
        if wrong := fault(name, array, header):
            raise TraceError(f"a request's {name} have {wrong}")


def _has(request: RequestTrace, name: str) -> str:
    return "lacks" if getattr(request, name) is None else "has"
