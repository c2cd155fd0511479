"""Imports expert fingerprints: JSON files, each with one or several requests.

A request has `full_text`, the strings of all its tokens, and `router_data`, a list of `{"token_P": {"layer_l":
{"selected_experts": [..], "selected_probs": [..], "full_scores": [..]}}}`, where P is the index in `full_text` of the
input token. `selected_probs` are normalised over the selected experts; `full_scores`, a distribution over all experts,
is mostly missing. The source has decode steps only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finemoe.errors import TraceError
from finemoe.trace.format import RequestTrace, TraceHeader
from finemoe.trace.importing.source import Progress, Vocabulary, by_weight, derived_experts
from finemoe.types import DECODE

LAYOUT = "a folder of *.json with router_data (expert fingerprints)"
_MARK = b'"router_data"'


def open_source(path: Path, model: str | None, experts: int | None, progress: Progress) -> FingerprintSource | None:
    """The source at `path` if it has this layout: a folder, searched recursively, or one file."""
    candidates = sorted(path.rglob("*.json")) if path.is_dir() else [path] * (path.suffix == ".json")
    files = [file for file in candidates if _MARK in file.read_bytes()]
    return FingerprintSource(files, model or path.resolve().stem, experts, progress) if files else None


class FingerprintSource:
    """Reads the files twice, one at a time: first for sizes and vocabulary, then for the requests."""

    def __init__(self, files: list[Path], model: str, experts: int | None, progress: Progress) -> None:
        self.notices: list[str] = []
        self._files = files
        self._model = model
        self._vocabulary = Vocabulary()
        self._count = 0
        highest, self._full, shapes = 0, True, set()
        for request in self._parsed(progress(files)):
            self._count += 1
            highest = max(highest, int(request.ids.max()))
            self._full &= request.probs is not None
            shapes.add((request.ids.shape[1:], None if request.probs is None else request.probs.shape[2]))
        if len({shape for shape, _ in shapes}) != 1 or (self._full and len(shapes) != 1):
            raise TraceError(f"{files[0].parent}: the requests are of models of different shapes: {sorted(shapes)}")
        (self._layers, self._active), scored = next(iter(shapes))
        self._experts = scored if self._full and scored else derived_experts(highest, experts, self.notices)

    def __len__(self) -> int:
        return self._count

    def header(self, licence: str | None) -> TraceHeader:
        return TraceHeader(
            model=self._model,
            layers=self._layers,
            experts=self._experts,
            active=self._active,
            fields=("weights", "probs") if self._full else ("weights",),
            source="imported: expert fingerprints",
            normalisation="as given: full_scores" if self._full else None,
            licence=licence,
            notes="token ids number the strings of the vocabulary, they are not the model's own",
            vocabulary=self._vocabulary.strings,
        )

    def requests(self) -> Iterator[RequestTrace]:
        for request in self._parsed(self._files):
            ids, weights = by_weight(request.ids, request.weights)
            decoded = np.arange(len(ids))
            yield RequestTrace(
                phases=np.full(len(decoded), DECODE, np.uint8),
                rows=np.arange(len(decoded) + 1),
                token_ids=request.tokens,
                expert_ids=ids,
                weights=weights,
                probs=request.probs if self._full else None,
            )

    def _parsed(self, files: Iterable[Path]) -> Iterator[_Request]:
        for file in files:
            try:
                content = json.loads(file.read_bytes())
                for number, table in enumerate(content if isinstance(content, list) else [content]):
                    yield _Request(table, self._vocabulary, f"{file}: request {number}")
            except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise TraceError(f"{file}: is damaged or of another layout ({error!r})") from error


class _Request:
    """One request as arrays."""

    def __init__(self, table: dict[str, Any], vocabulary: Vocabulary, place: str) -> None:
        text = table["full_text"]
        if not isinstance(text, list):
            raise TraceError(f"{place}: its full_text is not split into tokens; split it with the model's tokenizer")
        named = [item for entry in table["router_data"] for item in entry.items()]
        steps = [(int(name.removeprefix("token_")), own) for name, own in named]
        if not steps:
            raise TraceError(f"{place}: its router_data is empty")
        layers = sorted(steps[0][1], key=lambda name: int(name.removeprefix("layer_")))
        self.tokens = vocabulary.encode([text[position] for position, _ in steps])
        self.ids = _array(steps, layers, "selected_experts", np.int64)
        self.weights = _array(steps, layers, "selected_probs", np.float16)
        full = all("full_scores" in step[name] for _, step in steps for name in layers)
        self.probs = _array(steps, layers, "full_scores", np.float16) if full else None
        if self.ids.ndim != 3 or self.ids.shape != self.weights.shape:
            raise TraceError(f"{place}: selected_experts {self.ids.shape} and selected_probs {self.weights.shape}")


def _array(steps: list[tuple[int, Any]], layers: list[str], name: str, dtype: Any) -> NDArray[Any]:
    return np.array([[step[layer][name] for layer in layers] for _, step in steps], dtype)
