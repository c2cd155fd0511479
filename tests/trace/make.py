"""Makes synthetic traces of any size and fields, with random content."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from finemoe.trace import RequestTrace, TraceHeader, TraceWriter
from finemoe.trace.format import OPTIONAL


def make_header(present: tuple[str, ...] = ("weights",), **sizes: Any) -> TraceHeader:
    """A header with these optional fields."""
    chosen: dict[str, Any] = {
        "model": "a-model",
        "layers": 3,
        "experts": 8,
        "active": 2,
        "fingerprint": "0123456789abcdef",
    } | sizes
    return TraceHeader(
        fields=tuple(name for name in OPTIONAL if name in present),
        width=5 if "embeddings" in present else 0,
        lookahead=2 if "lookahead" in present else 0,
        **chosen,
    )


def make_request(header: TraceHeader, rng: np.random.Generator, prompt: int = 3, decoded: int = 2) -> RequestTrace:
    """Random routing that fits the header; some tokens execute fewer experts than `K`."""
    phases = np.array([0] * bool(prompt) + [1] * decoded, np.uint8)
    rows = np.cumsum([0, *([prompt] * bool(prompt)), *([1] * decoded)])
    tokens, layers, experts = int(rows[-1]), header.layers, header.experts
    ids = rng.random((tokens, layers, experts)).argsort(2)[:, :, : header.active].astype(header.id_dtype)
    ids[rng.random((tokens, layers)) < 0.1, -1] = header.sentinel

    def half(*shape: int) -> Any:
        return rng.random(shape).astype(np.float16)

    made = {
        "batch": int(rng.integers(9)),
        "weights": -np.sort(-half(tokens, layers, header.active), 2),
        "probs": half(tokens, layers, experts),
        "embeddings": half(len(phases), header.width),
        "lookahead": half(tokens, header.lookahead, layers, experts),
    }
    return RequestTrace(
        phases=phases,
        rows=rows,
        token_ids=rng.integers(0, 1000, tokens, dtype=np.int32),
        expert_ids=ids,
        **{name: made[name] for name in header.fields},
    )


def make_trace(path: Path, requests: int = 3, header: TraceHeader | None = None, seed: int = 0) -> list[RequestTrace]:
    """Writes a trace; returns its requests."""
    header = header or make_header()
    rng = np.random.default_rng(seed)
    made = [make_request(header, rng, prompt=1 + index, decoded=4) for index in range(requests)]
    with TraceWriter(path, header) as writer:
        for request in made:
            writer.add(request)
    return made


def equal(one: RequestTrace, other: RequestTrace) -> bool:
    """Whether two requests are equal in every field, missing ones included."""
    return all(np.array_equal(getattr(one, each.name), getattr(other, each.name)) for each in fields(RequestTrace))
