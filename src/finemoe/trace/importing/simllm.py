"""Imports simllm's preplay traces: JSON lines with a schema `simllm-preplay-trace-vN`.

A `header` row has the model, its number of experts and its MoE layers; `request` rows have request ids; a row for each
token that ran through the model has `phase`, `token_id`, `token_index` and `routing`, which has `expert_ids` for each
layer and, in some files, `gate_weights`. Other rows are ignored. A `footer` row has the numbers of rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from finemoe.errors import TraceError
from finemoe.trace.format import RequestTrace, TraceHeader
from finemoe.trace.importing.source import Progress, by_weight
from finemoe.types import DECODE, PREFILL

LAYOUT = "*.jsonl under a simllm-preplay-trace schema"
_SCHEMA = "simllm-preplay-trace-"
_KNOWN = ("v1", "v2")
_PHASES = {"prefill": PREFILL, "decode": DECODE}


def open_source(path: Path, model: str | None, _experts: int | None, progress: Progress) -> SimllmSource | None:
    """The source at `path` if it has this layout: a file, or a folder of files of one model."""
    candidates = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] * (path.suffix == ".jsonl")
    files = [file for file in candidates if _has_schema(file)]
    return SimllmSource(files, model, progress) if files else None


def _has_schema(file: Path) -> bool:
    with file.open("rb") as lines:
        return _SCHEMA.encode() in lines.readline(1 << 20)


class SimllmSource:
    """Reads everything at once: these traces are small."""

    def __init__(self, files: list[Path], model: str | None, progress: Progress) -> None:
        self.notices: list[str] = []
        parsed = [_File(file) for file in progress(files)]
        first = parsed[0]
        for other in parsed[1:]:
            if other.sizes != first.sizes:
                raise TraceError(f"{other.path}: is of another model than {first.path}; import one at a time")
        self._model, self._layers, self._experts, self._active = first.sizes
        self._model = model or self._model
        self._weighted = all(file.weighted for file in parsed)
        if not self._weighted:
            self.notices.append("weights: not in every row, so they are marked missing")
        self._schema = ", ".join(sorted({file.schema for file in parsed}))
        self._requests = [rows for file in parsed for rows in file.requests]

    def __len__(self) -> int:
        return len(self._requests)

    def header(self, licence: str | None) -> TraceHeader:
        return TraceHeader(
            model=self._model,
            layers=len(self._layers),
            experts=self._experts,
            active=self._active,
            fields=("weights",) if self._weighted else (),
            source=f"imported: {self._schema}",
            licence=licence,
            notes=None if self._weighted else "expert ids in the order of the source, which gives no weights",
        )

    def requests(self) -> Iterator[RequestTrace]:
        for rows in self._requests:
            prefill = [row for row in rows if _PHASES[row["phase"]] == PREFILL]
            decode = [row for row in rows if _PHASES[row["phase"]] == DECODE]
            ordered = sorted(prefill, key=lambda row: row["token_index"]) + sorted(
                decode, key=lambda row: row["token_index"]
            )
            counts = [len(prefill)] * bool(prefill) + [1] * len(decode)
            ids = np.array([[each["expert_ids"] for each in row["routing"]] for row in ordered])
            weights = None
            if self._weighted:
                gates = np.array([[each["gate_weights"] for each in row["routing"]] for row in ordered])
                ids, weights = by_weight(ids, gates)
                weights = weights.astype(np.float16)
            yield RequestTrace(
                phases=np.array([PREFILL] * bool(prefill) + [DECODE] * len(decode), np.uint8),
                rows=np.cumsum([0, *counts]),
                token_ids=np.array([row["token_id"] for row in ordered], np.int32),
                expert_ids=ids,
                weights=weights,
            )


class _File:
    """Parses and checks one file: its sizes, and the routing rows of each request."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requests: list[list[dict[str, Any]]] = []
        by_request: dict[str, list[dict[str, Any]]] = {}
        number, footer = 0, None
        try:
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    row = json.loads(line)
                    kind = row["row_type"]
                    if kind == "header":
                        self._read_header(row)
                    elif kind == "request":
                        by_request[row["request_id"]] = []
                    elif kind == "footer":
                        footer = row
                    elif "routing" in row:
                        self._check(row, number)
                        by_request[row["request_id"]].append(row)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise TraceError(f"{path}:{number}: is damaged or of another layout ({error!r})") from error
        self.requests = [rows for rows in by_request.values() if rows]
        if footer is None:
            raise TraceError(f"{path}: was cut off: it has no footer")
        for phase in _PHASES:
            stated = footer.get(f"{phase}_forward_token_count", footer.get(f"{phase}_dispatch_count"))
            counted = sum(row["phase"] == phase for rows in self.requests for row in rows)
            if stated is not None and stated != counted:
                raise TraceError(f"{path}: its footer states {stated} {phase} rows, it has {counted}")
        self.weighted = all("gate_weights" in each for rows in self.requests for row in rows for each in row["routing"])

    def _read_header(self, row: dict[str, Any]) -> None:
        self.schema = str(row["schema"])
        if self.schema.removeprefix(_SCHEMA) not in _KNOWN:
            raise TraceError(f"{self.path}: is under {self.schema}; known are {', '.join(_KNOWN)}")
        provenance = row["provenance"]
        layers = tuple(provenance["moe_layer_indices"])
        self.sizes = str(provenance["model_id"]), layers, int(provenance["expert_count"]), int(provenance["top_k"])

    def _check(self, row: dict[str, Any], number: int) -> None:
        _, layers, _, active = self.sizes
        if type(row["token_id"]) is not int or type(row["token_index"]) is not int:
            raise TraceError(f"{self.path}:{number}: its token_id or token_index is no whole number")
        if tuple(each["layer_index"] for each in row["routing"]) != layers or row["phase"] not in _PHASES:
            raise TraceError(f"{self.path}:{number}: its layers or phase are not those of the header")
        if any(len(each["expert_ids"]) != active for each in row["routing"]):
            raise TraceError(f"{self.path}:{number}: a layer has not {active} experts")
