"""The trace format: header, columns, requests, and the checks of their values. See docs/trace-format.md.

Shapes: `L` MoE layers, `E` experts of a layer, `K` experts per token, `D` hidden size, `n` layers of lookahead,
`R` requests, `I` iterations of a request, `T` tokens of a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finemoe.errors import TraceError
from finemoe.types import DECODE, PREFILL

# fields that a trace may lack; those in its header's `fields` were recorded, the others are missing
OPTIONAL = ("batch", "weights", "probs", "embeddings", "lookahead")
_MAX_SIZE = np.iinfo(np.uint16).max
_CHUNK_BYTES = 64 << 20  # checked at a time
_HALF_INFINITE = 0x7C00  # bits of float16 infinity; NaNs are above


@dataclass(frozen=True, kw_only=True)
class TraceHeader:
    """Describes a trace.

    Raises:
        TraceError: a size is out of range, or contradicts another or the fields; the message names it.
    """

    model: str
    layers: int  # L
    experts: int  # E
    active: int  # K
    width: int = 0  # D; 0 without embeddings
    lookahead: int = 0  # n; 0 without lookahead
    fields: tuple[str, ...] = ()  # of OPTIONAL, in its order
    fingerprint: str | None = None  # of the model's config and checkpoint headers
    source: str = "recorded"
    normalisation: str | None = None  # how `probs` and `lookahead` were computed from the routers' output
    licence: str | None = None
    notes: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the recording
    vocabulary: tuple[str, ...] | None = None  # strings that token ids index, for sources without token ids

    def __post_init__(self) -> None:
        for name, least in (("layers", 1), ("experts", 1), ("active", 1), ("width", 0), ("lookahead", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= _MAX_SIZE:
                raise TraceError(f"a trace's {name} must be a whole number from {least} to {_MAX_SIZE}, not {value!r}")
        if self.active > self.experts:
            raise TraceError(f"a trace can't have {self.active} active of {self.experts} experts")
        if self.fields != tuple(name for name in OPTIONAL if name in self.fields):
            raise TraceError(f"a trace's fields must be of {', '.join(OPTIONAL)}, in this order, not {self.fields!r}")
        for name, size in (("embeddings", self.width), ("lookahead", self.lookahead)):
            if (name in self.fields) != (size > 0):
                raise TraceError(f"a trace has the field {name} if and only if its size is above 0, not {size}")

    @property
    def missing(self) -> tuple[str, ...]:
        """The optional fields that were not recorded."""
        return tuple(name for name in OPTIONAL if name not in self.fields)

    @property
    def sentinel(self) -> int:
        """The expert id that fills up a token's ids if it executed fewer than `K` experts."""
        return int(np.iinfo(self.id_dtype).max)

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """Dtype of expert ids: the smallest unsigned integer that can hold the sentinel too."""
        return np.dtype(np.uint8 if self.experts <= np.iinfo(np.uint8).max else np.uint16)

    def difference(self, other: TraceHeader) -> str | None:
        """The first field that keeps requests under `other` out of a trace with this header; `None` if there is none.

        The result is text for an error message.
        """
        compared = (
            "model", "fingerprint", "layers", "experts", "active", "width", "lookahead", "fields", "normalisation",
            "vocabulary",
        )  # fmt: skip
        for name in compared:
            own, theirs = getattr(self, name), getattr(other, name)
            if name == "model" and self.fingerprint and self.fingerprint == other.fingerprint:
                continue  # the same model under another path
            if own != theirs:
                return f"{name}: {_short(own)} there, {_short(theirs)} here"
        return None

    def as_dict(self) -> dict[str, Any]:
        """The header as its JSON object."""
        return asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> TraceHeader:
        """The header from its JSON object. Unknown keys are ignored.

        Raises:
            TraceError, KeyError, TypeError: not a valid header.
        """
        known = {each.name for each in fields(cls)}
        given = {name: value for name, value in table.items() if name in known}
        for name in ("fields", "vocabulary"):
            if given.get(name) is not None:
                given[name] = tuple(given[name])
        return cls(**given)


@dataclass(frozen=True, slots=True)
class Column:
    """One column: an array `[count, *shape]` of `dtype`, with one row for each entry of its `table`."""

    name: str
    table: str  # "request", "iteration" or "token"
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


def columns(header: TraceHeader) -> tuple[Column, ...]:
    """The columns of a trace with this header, widest items first, which aligns each of them in the file."""
    layers, experts, active = header.layers, header.experts, header.active
    half = np.dtype(np.float16)
    available = (
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
    recorded = [column for column in available if column.name not in header.missing]
    return tuple(sorted(recorded, key=lambda column: -column.dtype.itemsize))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class RequestTrace:
    """The routing of one request: `I` iterations (its prefill, then one for each decoded token) of `T` tokens in all.

    Fields that were not recorded are `None`. Arrays from an open trace are read-only views of its file.
    """

    phases: NDArray[np.uint8]  # [I] 0 prefill, 1 decode
    rows: NDArray[np.int64]  # [I + 1] iteration i is token rows rows[i] to rows[i + 1]
    token_ids: NDArray[np.int32]  # [T]
    expert_ids: NDArray[np.uint8] | NDArray[np.uint16]  # [T, L, K] executed, by weight, descending; then sentinels
    weights: NDArray[np.float16] | None = None  # [T, L, K] as executed, not normalised
    probs: NDArray[np.float16] | None = None  # [T, L, E] the gate's distribution
    embeddings: NDArray[np.float16] | None = None  # [I, D] mean of the embedding layer's output over the tokens
    lookahead: NDArray[np.float16] | None = None  # [T, n, L, E] at [:, j, l]: gate l + 1 + j on gate l's input
    batch: int | None = None  # id of the batch that the request ran in

    def __len__(self) -> int:
        """Iterations."""
        return len(self.phases)

    def __repr__(self) -> str:
        recorded = ", ".join(name for name in OPTIONAL if getattr(self, name) is not None)
        return f"RequestTrace({len(self)} iterations, {len(self.token_ids)} tokens; {recorded or 'ids only'})"

    def check(self, header: TraceHeader) -> dict[str, NDArray[Any]]:
        """Validates this request and returns the rows that it adds to each column, by the column's name.

        Raises:
            TraceError: a field does not fit the header; the message names it.
        """
        for name in OPTIONAL:
            if (getattr(self, name) is None) != (name in header.missing):
                has = "lacks" if getattr(self, name) is None else "has"
                raise TraceError(f"a request {has} {name}, its trace does not agree")
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
        if not np.array_equal(table["expert_ids"], self.expert_ids):  # the narrower dtype has wrapped some around
            raise TraceError(f"a request's expert_ids must be below {header.experts}, or the sentinel")
        _check_values(table, header)
        return table


def _check_values(table: dict[str, NDArray[Any]], header: TraceHeader) -> None:
    for name, array in table.items():
        if wrong := fault(name, array, header):
            raise TraceError(f"a request's {name} have {wrong}")


def fault(name: str, values: NDArray[Any], header: TraceHeader) -> str | None:
    """Describes the first invalid value of a column; `None` if all are valid."""
    rows = max(1, _CHUNK_BYTES // max(1, values[:1].nbytes))
    chunks = (values[first : first + rows] for first in range(0, len(values), rows))
    return next((wrong for chunk in chunks if (wrong := _chunk_fault(name, chunk, header)) is not None), None)


def _chunk_fault(name: str, values: NDArray[Any], header: TraceHeader) -> str | None:
    if values.dtype == np.float16:
        bits = values.view(np.uint16) & 0x7FFF
        return "values that are not finite numbers" if (bits >= _HALF_INFINITE).any() else None
    if name == "token_ids":
        return "negative ids" if (values < 0).any() else None
    if name == "phases":
        return f"other phases than {PREFILL} and {DECODE}" if (values > DECODE).any() else None
    return _expert_ids_fault(values, header) if name == "expert_ids" else None


def _expert_ids_fault(ids: NDArray[Any], header: TraceHeader) -> str | None:
    ordered = np.sort(ids.reshape(-1, header.active), axis=1)
    real = ordered < header.experts
    if (~real & (ordered != header.sentinel)).any():
        return f"experts that are neither below {header.experts} nor the sentinel {header.sentinel}"
    twice = (ordered[:, 1:] == ordered[:, :-1]) & real[:, 1:]
    return "an expert twice for one token" if twice.any() else None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
