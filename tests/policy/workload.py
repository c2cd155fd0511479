"""Generated workloads: requests that start and end, with all inputs that a policy may get."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from finemoe.policy import Future, compute_future
from finemoe.policy.published.promoe import Predictors
from finemoe.types import DECODE, PREFILL, Recorded, Routed, Step


@dataclass(frozen=True)
class Shape:
    layers: int = 4
    experts: int = 6
    active: int = 2
    width: int = 5  # of an embedding


@dataclass(frozen=True)
class Iteration:
    steps: list[Step]
    events: list[Routed]


def softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(p / p.sum(-1, keepdims=True), np.float32)


def selected(p: npt.NDArray[np.float32], active: int) -> npt.NDArray[np.bool_]:
    """Mask `[.., E]` of the `active` likeliest."""
    return np.argsort(np.argsort(-p, axis=-1, kind="stable"), axis=-1) < active


def workload(
    seed: int,
    shape: Shape = Shape(),
    *,
    iterations: int = 12,
    batch: int = 2,
    embeddings: bool = True,
    truncated: bool = False,
) -> list[Iteration]:
    """Iterations of up to `batch` requests, whose routing drifts. `truncated`: gates of the selected experts only."""
    random = np.random.default_rng(seed)
    size = (shape.layers, shape.experts)
    running: dict[int, npt.NDArray[np.float64]] = {}
    next_request, made = 0, []
    for _ in range(iterations):
        for request in [r for r in running if random.random() < 0.2]:
            del running[request]
        started = set()
        while not running or (len(running) < batch and random.random() < 0.5):
            running[next_request] = 2 * random.normal(size=size)
            started.add(next_request)
            next_request += 1
        p = []
        for request, logits in running.items():
            running[request] = logits + 0.5 * random.normal(size=size)
            p.append(softmax(running[request]))
        full = np.stack(p)  # [B, L, E]
        mask = selected(full, shape.active)
        gates = np.where(mask, full, 0).astype(np.float32) if truncated else full
        steps = [
            Step(
                request,
                PREFILL if request in started else DECODE,
                random.integers(0, 7, 3 if request in started else 1).astype(np.int32),
                random.normal(size=shape.width).astype(np.float32) if embeddings else None,
            )
            for request in running
        ]
        events = []
        for layer in range(shape.layers):
            needed = tuple(np.flatnonzero(mask[:, layer].any(0)).tolist())
            after = np.ascontiguousarray(gates[:, layer + 1 : layer + 3])
            events.append(Routed(layer, needed, np.ascontiguousarray(gates[:, layer]), after))
        made.append(Iteration(steps, events))
    return made


def recorded(seed: int, shape: Shape = Shape(), *, length: int = 6, embeddings: bool = True) -> Recorded:
    """One finished request."""
    played = workload(seed, shape, iterations=length, batch=1, embeddings=embeddings)
    gates = np.stack([np.stack([event.gates[0] for event in it.events if event.gates is not None]) for it in played])
    keys = [it.steps[0].embedding for it in played]
    return Recorded(
        phases=np.array([PREFILL] + [DECODE] * (length - 1), np.uint8),
        token_ids=np.array([it.steps[0].token_ids[-1] for it in played], np.int32),
        gates=gates,
        executed=selected(gates, shape.active),
        embeddings=np.stack([key for key in keys if key is not None]) if embeddings else None,
    )


def future(played: list[Iteration], shape: Shape = Shape()) -> Future:
    events = [event for iteration in played for event in iteration.events]
    ptr = np.cumsum([0] + [len(event.experts) for event in events])
    flat = [event.layer * shape.experts + expert for event in events for expert in event.experts]
    return compute_future(shape.layers, shape.experts, ptr.astype(np.int64), np.array(flat, np.int64))


def untrained(shape: Shape = Shape(), *, stride: int = 2, history: int = 3, hidden: int = 4) -> Predictors:
    """Predictors with random weights."""
    random = np.random.default_rng(0)

    def weights(*size: int) -> npt.NDArray[np.float32]:
        return random.normal(size=size).astype(np.float32)

    layers, experts = shape.layers, shape.experts
    return Predictors(
        weights(layers, (history + 2) * experts, hidden),
        weights(layers, hidden),
        weights(layers, hidden, experts),
        weights(layers, experts),
        stride,
        history,
    )
