"""The rows of a trace as a person wants to see them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from finemoe.trace.read import Trace
from finemoe.trace.request import PREFILL


@dataclass(frozen=True)
class Row:
    """One token's routing."""

    iteration: int
    phase: str
    token_id: int
    token: str | None  # where the trace has a vocabulary
    expert_ids: list[list[int]]  # [L, up to K]
    weights: list[list[float]] | None

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        token = "" if self.token is None else f" {self.token!r}"
        lines = [f"iteration {self.iteration} ({self.phase}), token {self.token_id}{token}"]
        width = len(str(len(self.expert_ids) - 1))
        for layer, ids in enumerate(self.expert_ids):
            weights = self.weights[layer] if self.weights else [None] * len(ids)
            cells = [f"{i:>4}" + ("" if w is None else f" {w:.3f}") for i, w in zip(ids, weights, strict=True)]
            lines.append(f"  layer {layer:>{width}}: {' '.join(cells)}")
        return "\n".join(lines)


def rows(trace: Trace, index: int, count: int) -> list[Row]:
    """The first `count` token rows of a request."""
    request, header = trace.request(index), trace.header
    vocabulary = dict(enumerate(header.vocabulary or ()))
    iterations = np.repeat(np.arange(len(request)), np.diff(request.rows))
    shown = []
    for row in range(min(count, len(request.token_ids))):
        executed = request.expert_ids[row] < header.experts  # [L, K]
        token, weights = int(request.token_ids[row]), request.weights
        shown.append(
            Row(
                iteration=int(iterations[row]),
                phase="prefill" if request.phases[iterations[row]] == PREFILL else "decode",
                token_id=token,
                token=vocabulary.get(token),
                expert_ids=[ids[ran].tolist() for ids, ran in zip(request.expert_ids[row], executed, strict=True)],
                weights=None
                if weights is None
                else [own[ran].astype(float).tolist() for own, ran in zip(weights[row], executed, strict=True)],
            )
        )
    return shown
