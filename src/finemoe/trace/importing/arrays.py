"""Imports routing stored as arrays: a folder with `routing.npz` and `prompts.jsonl`.

The npz has `expert_ids [N, L, K]`, `probs [N, L, K]` and `offsets [R + 1]`. There are decode steps only, one row each;
row t of a request is for the t-th of its `input_tokens` in the JSON lines. `probs` are normalised over the selected
experts: they become weights, and the full distribution is missing.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finemoe.errors import TraceError
from finemoe.trace.format import RequestTrace, TraceHeader
from finemoe.trace.importing.source import Progress, Vocabulary, by_weight, derived_experts
from finemoe.types import DECODE

LAYOUT = "a folder with routing.npz and prompts.jsonl"
_ARRAYS, _PROMPTS = "routing.npz", "prompts.jsonl"


def open_source(path: Path, model: str | None, experts: int | None, _progress: Progress) -> ArraySource | None:
    """The source at `path` if it has this layout: the folder, or the npz itself."""
    file = path / _ARRAYS if path.is_dir() else path
    return ArraySource(file, model, experts) if file.suffix == ".npz" and file.is_file() else None


class ArraySource:
    """Reads everything at once: a row takes a few hundred bytes."""

    def __init__(self, file: Path, model: str | None, experts: int | None) -> None:
        self.notices: list[str] = []
        self._file = file
        self._model = model or file.resolve().parent.name
        table = _load(file)
        self._ids, self._offsets, self._weights = table["expert_ids"], table["offsets"], table.get("probs")
        self._vocabulary = Vocabulary()
        self._tokens = [self._vocabulary.encode(tokens) for tokens in _tokens(file.parent / _PROMPTS)]
        self._check()
        self._experts = derived_experts(int(self._ids.max()), experts, self.notices)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def header(self, licence: str | None) -> TraceHeader:
        return TraceHeader(
            model=self._model,
            layers=self._ids.shape[1],
            experts=self._experts,
            active=self._ids.shape[2],
            fields=() if self._weights is None else ("weights",),
            source=f"imported: {_ARRAYS}",
            licence=licence,
            notes="decoding only; token ids number the strings of the vocabulary, they are not the model's own",
            vocabulary=self._vocabulary.strings,
        )

    def requests(self) -> Iterator[RequestTrace]:
        for index, tokens in enumerate(self._tokens):
            rows = slice(int(self._offsets[index]), int(self._offsets[index + 1]))
            ids, weights = self._ids[rows], None
            if self._weights is not None:
                ids, weights = by_weight(ids, self._weights[rows])
            yield RequestTrace(
                phases=np.full(len(tokens), DECODE, np.uint8),
                rows=np.arange(len(tokens) + 1),
                token_ids=tokens,
                expert_ids=ids,
                weights=weights,
            )

    def _check(self) -> None:
        ids, offsets, weights = self._ids, self._offsets, self._weights
        if ids.ndim != 3 or ids.dtype.kind not in "iu" or not ids.size:
            raise TraceError(f"{self._file}: expert_ids are {ids.dtype} {list(ids.shape)}, not whole numbers [N, L, K]")
        if weights is not None and (weights.shape != ids.shape or weights.dtype.kind != "f"):
            raise TraceError(f"{self._file}: probs are {weights.dtype} {list(weights.shape)}, unlike expert_ids")
        ascending = offsets.ndim == 1 and len(offsets) > 1 and (np.diff(offsets) > 0).all()
        if not ascending or offsets[0] or offsets[-1] != len(ids):
            raise TraceError(f"{self._file}: offsets don't ascend from 0 to the {len(ids)} rows of expert_ids")
        if len(self._tokens) != len(self):
            raise TraceError(f"{self._file.parent / _PROMPTS}: has {len(self._tokens)} requests, the npz {len(self)}")
        for index, tokens in enumerate(self._tokens):
            rows = int(offsets[index + 1] - offsets[index])
            if len(tokens) != rows:
                raise TraceError(
                    f"{self._file.parent / _PROMPTS}: request {index} has {len(tokens)} input_tokens for {rows} rows"
                )


def _load(file: Path) -> dict[str, NDArray[Any]]:
    try:
        with file.open("rb") as raw, np.load(raw) as archive:
            table = {name: archive[name] for name in archive.files if name in {"expert_ids", "probs", "offsets"}}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise TraceError(f"{file}: can't be read ({str(error).splitlines()[0]})") from error
    for name in ("expert_ids", "offsets"):
        if name not in table:
            raise TraceError(f"{file}: has no array {name}")
    return table


def _tokens(file: Path) -> list[list[str]]:
    """The input tokens of each request."""
    tokens = []
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    strings = json.loads(line)["input_tokens"]
                    if not isinstance(strings, list) or not all(isinstance(token, str) for token in strings):
                        raise TraceError(f"{file}:{number}: input_tokens are not a list of strings")
                    tokens.append(strings)
    except FileNotFoundError as error:
        raise TraceError(f"{file}: is missing; it has the tokens of the npz") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TraceError(f"{file}: damaged after request {len(tokens)} ({error!r})") from error
    return tokens
