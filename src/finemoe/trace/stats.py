"""Locality statistics of a trace: reuse between tokens, popularity skew, entropies, lookahead recall.

Also splits a trace's requests into a store and a test set. Shapes as in `trace.format`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finemoe.trace.format import RequestTrace, TraceHeader
from finemoe.trace.reader import Trace
from finemoe.types import DECODE, PREFILL

TOP_SHARES = (0.10, 0.25, 0.50)
_PHASES = {"decode": DECODE, "prefill": PREFILL}
_CHUNK_ROWS = 2048
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class TraceStats:
    """Statistics over a trace; `None` if the field was not recorded, or there are no samples.

    A token's accesses in a layer are its executed experts. Shares and recalls are between 0 and 1, entropies in bits.
    """

    requests: int
    tokens: int
    experts: int
    active: int
    usage: NDArray[np.int64]  # [L, E] accesses
    reuse: dict[str, Floats | None]  # by phase, [L] share of executed experts that the previous token executed too
    popularity: Floats  # [L * E + 1] share of all accesses that go to the i most accessed experts, i from 0
    popularity_of_request: Floats  # the same for a single request, mean over requests
    gate_entropy: Floats | None  # [L] of the gate's distribution, mean over tokens
    recall: Floats | None  # [n] share of executed experts among the top K of the lookahead, by distance in layers

    @property
    def usage_entropy(self) -> Floats:
        """`[L]` entropy of the access frequencies of a layer's experts; `log2(E)` if uniform."""
        return _entropy(self.usage / np.maximum(self.usage.sum(1, keepdims=True), 1))

    def top(self, share: float, curve: Floats) -> float:
        """Share of accesses that go to the most accessed `share` of experts, by a popularity curve."""
        return float(np.interp(share * (len(curve) - 1), np.arange(len(curve)), curve))

    def as_dict(self) -> dict[str, Any]:
        """All statistics, ready for JSON."""
        curves = {"popularity": self.popularity, "popularity_of_request": self.popularity_of_request}
        return {
            "requests": self.requests,
            "tokens": self.tokens,
            "reuse": {phase: _mean(values) for phase, values in self.reuse.items()},
            "reuse_by_layer": {phase: _listed(values) for phase, values in self.reuse.items()},
            "reuse_by_chance": self.active / self.experts,
            **{
                name: {f"top_{share:.0%}": self.top(share, curve) for share in TOP_SHARES}
                for name, curve in curves.items()
            },
            "usage_entropy": _mean(self.usage_entropy),
            "usage_entropy_by_layer": _listed(self.usage_entropy),
            "gate_entropy": _mean(self.gate_entropy),
            "gate_entropy_by_layer": _listed(self.gate_entropy),
            "entropy_limit": float(np.log2(self.experts)),
            "lookahead_recall": _listed(self.recall),
        }

    def __str__(self) -> str:
        limit = np.log2(self.experts)
        chance = self.active / self.experts
        lines = [f"{self.requests} requests, {self.tokens} tokens"]
        lines += [
            f"reuse of the previous token's experts, {phase}: {_shown(_mean(values))}"
            for phase, values in self.reuse.items()
            if values is not None
        ]
        lines[-1] += f" (by chance {chance:.1%})" if len(lines) > 1 else ""
        for name, curve in (("all requests", self.popularity), ("within a request", self.popularity_of_request)):
            tops = ", ".join(f"top {share:.0%} {self.top(share, curve):.1%}" for share in TOP_SHARES)
            lines.append(f"accesses of the most popular experts, {name}: {tops}")
        lines.append(f"entropy of usage: {self.usage_entropy.mean():.2f} of {limit:.2f} bits")
        gate = "not recorded" if self.gate_entropy is None else f"{self.gate_entropy.mean():.2f} of {limit:.2f} bits"
        lines.append(f"entropy of the gate: {gate}")
        recall = "not recorded"
        if self.recall is not None:
            recall = ", ".join(f"{distance}: {value:.1%}" for distance, value in enumerate(self.recall, 1))
        lines.append(f"recall of the lookahead, by layers ahead: {recall}")
        return "\n".join(lines)


def measure(trace: Trace, progress: Callable[[Trace], Iterable[RequestTrace]] = iter) -> TraceStats:
    """Computes the statistics in one pass over a trace, in chunks of tokens.

    Args:
        trace: an open trace.
        progress: wraps the iteration over the trace's requests, to show a progress bar.
    """
    header = trace.header
    layers, experts = header.layers, header.experts
    usage = np.zeros((layers, experts), np.int64)
    curve_sum, nonempty = np.zeros(layers * experts + 1), 0
    reuse = {phase: (np.zeros(layers), np.zeros(layers)) for phase in _PHASES}  # reused, executed
    entropy, recall = np.zeros(layers), np.zeros((2, header.lookahead))  # sums; hits, executed
    for request in progress(trace):
        request_usage = _usage(request, header)
        usage += request_usage
        if request_usage.sum():
            curve_sum += _popularity(request_usage)
            nonempty += 1
        phase_of_row = np.repeat(request.phases, np.diff(request.rows))
        for start in range(0, len(request.token_ids), _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            executed = _executed(request.expert_ids[rows], header)
            previous = _executed(request.expert_ids[max(0, start - 1) : start + len(executed) - 1], header)
            first = len(executed) - len(previous)  # 1 in the first chunk: its first token has no previous one
            reused = (executed[first:] & previous).sum(2)
            counts = executed[first:].sum(2)
            for phase, code in _PHASES.items():
                in_phase = phase_of_row[rows][first:] == code
                reuse[phase][0][:] += reused[in_phase].sum(0)
                reuse[phase][1][:] += counts[in_phase].sum(0)
            if request.probs is not None:
                entropy += _entropy(_normalised(request.probs[rows])).sum(0)
            if request.lookahead is not None:
                recall += _lookahead_hits(request.lookahead[rows], executed, header.active)
    return TraceStats(
        requests=len(trace),
        tokens=trace.tokens,
        experts=experts,
        active=header.active,
        usage=usage,
        reuse={phase: sums[0] / np.maximum(sums[1], 1) if sums[1].any() else None for phase, sums in reuse.items()},
        popularity=_popularity(usage),
        popularity_of_request=curve_sum / max(nonempty, 1),
        gate_entropy=entropy / max(trace.tokens, 1) if "probs" in header.fields else None,
        recall=recall[0] / np.maximum(recall[1], 1) if header.lookahead else None,
    )


def split(requests: int, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Shuffles request indices and splits them into a store and a test set.

    Args:
        requests: number of requests.
        share: of them, for the store; rounded to whole requests.
        seed: of the shuffle.

    Returns:
        Indices for the store, and indices to test on.
    """
    shuffled = np.random.default_rng(seed).permutation(requests)
    stored = round(requests * share)
    return shuffled[:stored], shuffled[stored:]


def _usage(request: RequestTrace, header: TraceHeader) -> NDArray[np.int64]:
    """`[L, E]` accesses of one request."""
    ids = request.expert_ids.astype(np.int64)  # [T, L, K]
    flat = (ids + np.arange(header.layers)[:, None] * header.experts)[ids < header.experts]
    return np.bincount(flat, minlength=header.layers * header.experts).reshape(header.layers, header.experts)


def _executed(ids: NDArray[Any], header: TraceHeader) -> NDArray[np.bool_]:
    """`[T, L, E]` whether a token executed an expert."""
    executed = np.zeros((*ids.shape[:2], header.experts + 1), bool)  # the last column is for sentinels
    np.put_along_axis(executed, np.minimum(ids, header.experts).astype(np.int64), values=True, axis=2)
    return executed[:, :, : header.experts]


def _popularity(usage: NDArray[np.int64]) -> Floats:
    """`[L * E + 1]` share of all accesses that go to the i most accessed experts, i from 0."""
    ordered = -np.sort(-usage.reshape(-1))
    return np.concatenate([[0.0], np.cumsum(ordered) / max(ordered.sum(), 1)])


def _lookahead_hits(lookahead: NDArray[np.float16], executed: NDArray[np.bool_], active: int) -> Floats:
    """`[2, n]` executed experts among the top K predicted j layers earlier, and all executed experts."""
    distances = lookahead.shape[1]
    counts = np.zeros((2, distances))
    for distance in range(1, min(distances, executed.shape[1] - 1) + 1):
        scores = lookahead[:, distance - 1, :-distance].astype(np.float32)
        predicted = np.argpartition(-scores, active - 1, axis=2)[:, :, :active]
        later = executed[:, distance:]
        counts[0, distance - 1] = np.take_along_axis(later, predicted, 2).sum()
        counts[1, distance - 1] = later.sum()
    return counts


def _normalised(probs: NDArray[np.float16]) -> Floats:
    wide: Floats = probs.astype(np.float64)
    wide /= np.maximum(wide.sum(-1, keepdims=True), 1e-12)
    return wide


def _entropy(shares: Floats) -> Floats:
    """Entropy in bits over the last axis."""
    logs = np.log2(shares, where=shares > 0, out=np.zeros_like(shares))
    entropy: Floats = -(shares * logs).sum(-1)
    return entropy


def _mean(values: Floats | None) -> float | None:
    return None if values is None else float(values.mean())


def _listed(values: Floats | None) -> list[float] | None:
    return None if values is None else [float(value) for value in values]


def _shown(value: float | None) -> str:
    return "not recorded" if value is None else f"{value:.1%}"
