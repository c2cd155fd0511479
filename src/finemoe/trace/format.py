"""What a trace says about itself: the model's sizes, which fields were recorded, and where it all comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finemoe.errors import TraceError
from finemoe.types import DECODE, PREFILL

# what a trace may lack; a field that is not listed in its header was not recorded, and is never made up
OPTIONAL = ("batch", "weights", "probs", "embeddings", "lookahead")
_LARGEST = np.iinfo(np.uint16).max


@dataclass(frozen=True, kw_only=True)
class TraceHeader:
    """Describes a trace. Letters as everywhere: `L` layers, `E` experts, `K` active, `D` width, `n` lookahead.

    Raises:
        TraceError: sizes that contradict each other or the fields; the message names the size.
    """

    model: str
    layers: int
    experts: int
    active: int
    width: int = 0  # D; 0 without embeddings
    lookahead: int = 0  # n; 0 without lookahead
    fields: tuple[str, ...] = ()  # of OPTIONAL, in its order
    fingerprint: str | None = None  # of the model's config and checkpoint headers
    source: str = "recorded"
    normalisation: str | None = None  # how `probs` and `lookahead` came from what the routers give
    licence: str | None = None
    notes: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # how it was recorded
    vocabulary: tuple[str, ...] | None = None  # what token ids count where the source has strings and no ids

    def __post_init__(self) -> None:
        for name, least in (("layers", 1), ("experts", 1), ("active", 1), ("width", 0), ("lookahead", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= _LARGEST:
                raise TraceError(f"a trace's {name} must be a whole number from {least} to {_LARGEST}, not {value!r}")
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
        """The expert id that stands where a token executed fewer than `K` experts."""
        return int(np.iinfo(self.id_dtype).max)

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """Of expert ids: the smallest that has room for the sentinel too."""
        return np.dtype(np.uint8 if self.experts <= np.iinfo(np.uint8).max else np.uint16)

    def difference(self, other: TraceHeader) -> str | None:
        """What keeps requests under `other` from a trace under this header; `None` if nothing does."""
        alike = (
            "model", "fingerprint", "layers", "experts", "active", "width", "lookahead", "fields", "normalisation",
            "vocabulary",
        )  # fmt: skip
        for name in alike:
            own, theirs = getattr(self, name), getattr(other, name)
            if name == "model" and self.fingerprint and self.fingerprint == other.fingerprint:
                continue  # the same model by another path
            if own != theirs:
                return f"{name}: {_short(own)} there, {_short(theirs)} here"
        return None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> TraceHeader:
        """The header out of its JSON. Keys of later minor additions are passed over.

        Raises:
            TraceError, KeyError, TypeError: it is not one.
        """
        known = {each.name for each in fields(cls)}
        given = {name: value for name, value in table.items() if name in known}
        for name in ("fields", "vocabulary"):
            if given.get(name) is not None:
                given[name] = tuple(given[name])
        return cls(**given)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


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
