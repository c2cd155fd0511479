"""What may stand in a column. Checked a stretch at a time, so that a column may be larger than memory."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from finemoe.trace.header import TraceHeader
from finemoe.types import DECODE, PREFILL

_CHUNK_BYTES = 64 << 20
_HALF_INFINITE = 0x7C00  # float16 without its sign: this and above is no number


def fault(name: str, values: NDArray[Any], header: TraceHeader) -> str | None:
    """What is wrong with values of the column of this name; `None` if nothing is."""
    rows = max(1, _CHUNK_BYTES // max(1, values[:1].nbytes))
    stretches = (values[first : first + rows] for first in range(0, len(values), rows))
    return next((wrong for each in stretches if (wrong := _fault(name, each, header)) is not None), None)


def _fault(name: str, values: NDArray[Any], header: TraceHeader) -> str | None:
    if values.dtype == np.float16:
        bits = values.view(np.uint16) & 0x7FFF
        return "values that are not finite numbers" if (bits >= _HALF_INFINITE).any() else None
    if name == "token_ids":
        return "negative ids" if (values < 0).any() else None
    if name == "phases":
        return f"other phases than {PREFILL} and {DECODE}" if (values > DECODE).any() else None
    return _ids_fault(values, header) if name == "expert_ids" else None


def _ids_fault(ids: NDArray[Any], header: TraceHeader) -> str | None:
    ordered = np.sort(ids.reshape(-1, header.active), axis=1)
    real = ordered < header.experts
    if (~real & (ordered != header.sentinel)).any():
        return f"experts that are neither below {header.experts} nor the sentinel {header.sentinel}"
    twice = (ordered[:, 1:] == ordered[:, :-1]) & real[:, 1:]
    return "an expert twice for one token" if twice.any() else None
