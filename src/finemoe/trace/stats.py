"""How predictable recorded routing is: reuse between tokens, popularity skew, entropies, recall of the lookahead."""

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
    """Measured over all of a trace; `None` where a field was not recorded or there was nothing to measure.

    A token's accesses in a layer are its executed experts. Shares and recalls are between 0 and 1, entropies in bits.
    """

    requests: int
    tokens: int
    experts: int
    active: int
    usage: NDArray[np.int64]  # [L, E] accesses
    reuse: dict[str, Floats | None]  # by phase, [L]: executed experts that the token before executed too
    popularity: Floats  # [L * E + 1] share of accesses of the most accessed experts, all layers and requests together
    popularity_of_request: Floats  # the same within a request, mean
    gate_entropy: Floats | None  # [L] of the gate's distribution, mean over tokens
    recall: Floats | None  # [n] of the executed experts among the K that the gate j layers on ranks first

    @property
    def usage_entropy(self) -> Floats:
        """`[L]` of how often each expert of a layer is accessed; `log2(E)` if all are alike."""
        return _entropy(self.usage / np.maximum(self.usage.sum(1, keepdims=True), 1))

    def top(self, share: float, curve: Floats) -> float:
        """Share of accesses that the most accessed `share` of experts have."""
        return float(np.interp(share * (len(curve) - 1), np.arange(len(curve)), curve))

    def as_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
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
            f"reuse of the token before, {phase}: {_shown(_mean(values))}"
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
            recall = ", ".join(f"{distance} on {value:.1%}" for distance, value in enumerate(self.recall, 1))
        lines.append(f"recall of the lookahead, by layers: {recall}")
        return "\n".join(lines)


def measure(trace: Trace, progress: Callable[[Trace], Iterable[RequestTrace]] = iter) -> TraceStats:
    """Reads all of a trace once, a stretch of tokens at a time.

    Args:
        trace: any.
        progress: wraps the trace while its requests are gone through, to show how far that is.
    """
    header = trace.header
    layers, experts = header.layers, header.experts
    usage = np.zeros((layers, experts), np.int64)
    curve, counted = np.zeros(layers * experts + 1), 0
    reuse = {phase: (np.zeros(layers), np.zeros(layers)) for phase in _PHASES}
    entropy, found = np.zeros(layers), np.zeros((2, header.lookahead))
    for request in progress(trace):
        own = _usage(request, header)
        usage += own
        if own.sum():
            curve += _popularity(own)
            counted += 1
        phase_of_row = np.repeat(request.phases, np.diff(request.rows))
        for start in range(0, len(request.token_ids), _CHUNK_ROWS):
            rows = slice(start, start + _CHUNK_ROWS)
            executed = _executed(request.expert_ids[rows], header)
            before = _executed(request.expert_ids[max(0, start - 1) : start + len(executed) - 1], header)
            again = (executed[len(executed) - len(before) :] & before).sum(2)
            ran = executed[len(executed) - len(before) :].sum(2)
            for phase, code in _PHASES.items():
                chosen = phase_of_row[rows][len(executed) - len(before) :] == code
                reuse[phase][0][:] += again[chosen].sum(0)
                reuse[phase][1][:] += ran[chosen].sum(0)
            if request.probs is not None:
                entropy += _entropy(_normalised(request.probs[rows])).sum(0)
            if request.lookahead is not None:
                found += _found(request.lookahead[rows], executed, header.active)
    return TraceStats(
        requests=len(trace),
        tokens=trace.tokens,
        experts=experts,
        active=header.active,
        usage=usage,
        reuse={phase: again / np.maximum(ran, 1) if ran.any() else None for phase, (again, ran) in reuse.items()},
        popularity=_popularity(usage),
        popularity_of_request=curve / max(counted, 1),
        gate_entropy=entropy / max(trace.tokens, 1) if "probs" in header.fields else None,
        recall=found[0] / np.maximum(found[1], 1) if header.lookahead else None,
    )


def _usage(request: RequestTrace, header: TraceHeader) -> NDArray[np.int64]:
    """`[L, E]` accesses of one request."""
    ids = request.expert_ids.astype(np.int64)  # [n, L, K]
    flat = (ids + np.arange(header.layers)[:, None] * header.experts)[ids < header.experts]
    return np.bincount(flat, minlength=header.layers * header.experts).reshape(header.layers, header.experts)


def _executed(ids: NDArray[Any], header: TraceHeader) -> NDArray[np.bool_]:
    """`[n, L, E]` whether a token executed an expert."""
    held = np.zeros((*ids.shape[:2], header.experts + 1), bool)
    np.put_along_axis(held, np.minimum(ids, header.experts).astype(np.int64), values=True, axis=2)
    return held[:, :, : header.experts]


def _popularity(usage: NDArray[np.int64]) -> Floats:
    """`[L * E + 1]` share of all accesses that the n most accessed experts have, n from 0 on."""
    ordered = -np.sort(-usage.reshape(-1))
    return np.concatenate([[0.0], np.cumsum(ordered) / max(ordered.sum(), 1)])


def _found(lookahead: NDArray[np.float16], executed: NDArray[np.bool_], active: int) -> Floats:
    """`[2, n]` executed experts that were among the K foreseen j layers before, and all executed ones."""
    distances = lookahead.shape[1]
    counts = np.zeros((2, distances))
    for distance in range(1, min(distances, executed.shape[1] - 1) + 1):
        scores = lookahead[:, distance - 1, :-distance].astype(np.float32)
        foreseen = np.argpartition(-scores, active - 1, axis=2)[:, :, :active]
        later = executed[:, distance:]
        counts[0, distance - 1] = np.take_along_axis(later, foreseen, 2).sum()
        counts[1, distance - 1] = later.sum()
    return counts


def _normalised(probs: NDArray[np.float16]) -> Floats:
    wide: Floats = probs.astype(np.float64)
    wide /= np.maximum(wide.sum(-1, keepdims=True), 1e-12)
    return wide


def _entropy(shares: Floats) -> Floats:
    """In bits, over the last axis."""
    logs = np.log2(shares, where=shares > 0, out=np.zeros_like(shares))
    entropy: Floats = -(shares * logs).sum(-1)
    return entropy


def _mean(values: Floats | None) -> float | None:
    return None if values is None else float(values.mean())


def _listed(values: Floats | None) -> list[float] | None:
    return None if values is None else [float(value) for value in values]


def _shown(value: float | None) -> str:
    return "not recorded" if value is None else f"{value:.1%}"


def split(requests: int, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the requests for the store and of those to replay, shuffled.

    Args:
        requests: how many there are.
        share: of them, for the store; rounded to whole requests.
        seed: of the shuffle.
    """
    shuffled = np.random.default_rng(seed).permutation(requests)
    stored = round(requests * share)
    return shuffled[:stored], shuffled[stored:]
