"""Small traces with some locality."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from finemoe.trace import RequestTrace, Trace, TraceHeader, TraceWriter, open_trace

LAYERS, EXPERTS, ACTIVE, WIDTH, AHEAD = 4, 8, 2, 5, 2


def make_trace(folder: Path, seed: int = 0, requests: int = 4, iterations: int = 12, prompt: int = 3) -> Trace:
    """Random walks through gate logits: what was likely stays likely. A prefill, then decoding."""
    random = np.random.default_rng(seed)
    header = TraceHeader(
        model="walk", layers=LAYERS, experts=EXPERTS, active=ACTIVE, width=WIDTH, lookahead=AHEAD,
        fields=("weights", "probs", "embeddings", "lookahead"),
    )  # fmt: skip
    path = folder / f"walk-{seed}-{requests}-{iterations}-{prompt}.safetensors"
    with TraceWriter(path, header) as writer:
        for _ in range(requests):
            counts = np.array([prompt] + [1] * (iterations - 1)) if prompt else np.ones(iterations, int)
            rows = int(counts.sum())
            logits = 2 * random.normal(size=(LAYERS, EXPERTS)) + np.cumsum(
                0.6 * random.normal(size=(rows, LAYERS, EXPERTS)), axis=0
            )
            probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            ids = np.argsort(-probs, axis=-1)[..., :ACTIVE]
            ahead = np.zeros((rows, AHEAD, LAYERS, EXPERTS))
            for distance in range(1, AHEAD + 1):
                ahead[:, distance - 1, : LAYERS - distance] = probs[:, distance:]
            writer.add(
                RequestTrace(
                    phases=np.array([0 if prompt else 1] + [1] * (iterations - 1), np.uint8),
                    rows=np.concatenate([[0], np.cumsum(counts)]),
                    token_ids=random.integers(0, 50, rows).astype(np.int32),
                    expert_ids=ids.astype(np.uint8),
                    weights=np.take_along_axis(probs, ids, -1).astype(np.float16),
                    probs=probs.astype(np.float16),
                    embeddings=random.normal(size=(iterations, WIDTH)).astype(np.float16),
                    lookahead=ahead.astype(np.float16),
                )
            )
    return open_trace(path)
