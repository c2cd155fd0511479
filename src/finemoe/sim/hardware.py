"""The modelled machine, and times that vary on it as they do on real ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from finemoe.policy.cache_state import Scores

TIMING = (
    "before_gate", "gap", "lag", "begin_lag", "prefetch_slowdown", "compute_spread", "link_spread", "lag_spread",
)  # fmt: skip # of Machine: what the simulator is told about time, besides the link ratio
_TRANSFERS = 1 << 16  # drawn; then they come round again


@dataclass(frozen=True)
class Machine:
    """The modelled machine. Times are in units of one layer's compute for one token.

    A spread is the standard deviation of a time's logarithm: such times are log-normal around their mean, each drawn by
    itself.

    Attributes:
        capacity: `C`, expert slots of all devices together.
        link_ratio: time to move one expert, latency included.
        devices: each has a link of its own and an equal part of the slots; experts live on them round-robin.
        chunks: an expert moves in so many pieces; a prefetch is pre-empted between two. 0: at any time.
        ready_first: experts compute as they arrive; otherwise all together once the last is there.
        tokens_per_unit: a layer computes so many tokens in the time of one; more take proportionally longer.
        before_gate: share of a layer's compute before its gate.
        gap: time from the last layer of an iteration to the first of the next, in which links go on.
        lag: how long a policy that deliberates thinks about a gate. Then what it makes of it counts; never, if the next
            event has come by then, which waits for its turn.
        begin_lag: the same of an iteration's begin; by default as of a gate.
        prefetch_slowdown: what is not urgent takes so many times the link ratio.
        compute_spread: of a layer's compute, before and after its gate.
        link_spread: of the link ratio.
        lag_spread: of both lags.
        seed: of what is drawn.
    """

    capacity: int
    link_ratio: float
    devices: int = 1
    chunks: int = 16
    ready_first: bool = True
    tokens_per_unit: int = 64
    before_gate: float = 0.5
    gap: float = 0.0
    lag: float = 0.0
    begin_lag: float | None = None
    prefetch_slowdown: float = 1.0
    compute_spread: float = 0.0
    link_spread: float = 0.0
    lag_spread: float = 0.0
    seed: int = 0


class Noise:
    """Factors around 1 for a machine's times: the same ones for the same seed, in the order of asking.

    Attributes:
        transfers: `[n]`, of one expert's way after another; at the end they begin again.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        transfers, self._computes, self._lags = np.random.default_rng(machine.seed).spawn(3)
        self.transfers = _factors(machine.link_spread, transfers, _TRANSFERS if machine.link_spread else 1)

    def computes(self, layers: int) -> Scores:
        """`[2, L]` of the next iteration: before each gate, and after it."""
        return _factors(self._machine.compute_spread, self._computes, 2 * layers).reshape(2, layers)

    def lag(self) -> float:
        """Of the next event."""
        return float(_factors(self._machine.lag_spread, self._lags, 1)[0])


def _factors(spread: float, draw: np.random.Generator, count: int) -> Scores:
    if spread == 0:
        return np.ones(count)
    return np.exp(draw.normal(-spread * spread / 2, spread, count))


@dataclass(frozen=True)
class ModelShape:
    """One MoE layer of a model."""

    layers: int  # L
    experts: int  # E
    active: int  # K
    expert_bytes: int
    dense_bytes: int  # attention, shared experts, norms and router of one layer


@dataclass(frozen=True)
class Hardware:
    """A device and its link."""

    memory_bytes_s: float
    link_bytes_s: float
    link_latency_s: float


def _mlp(hidden: int, intermediate: int, bits: float = 16) -> int:
    """Bytes of a gated feed-forward block: gate, up and down."""
    return int(3 * hidden * intermediate * bits / 8)


def _attention(hidden: int, query: int, key_value: int, bits: float = 16) -> int:
    return int((2 * hidden * query + 2 * hidden * key_value) * bits / 8)


SHAPES = {
    "mixtral-8x7b": ModelShape(32, 8, 2, _mlp(4096, 14336), _attention(4096, 4096, 1024)),
    "qwen1.5-moe": ModelShape(24, 60, 4, _mlp(2048, 1408), _attention(2048, 2048, 2048) + _mlp(2048, 5632)),
    "phi-3.5-moe": ModelShape(32, 16, 2, _mlp(4096, 6400), _attention(4096, 4096, 1024)),
    "gpt-oss-20b": ModelShape(24, 32, 4, _mlp(2880, 2880, 4.25), _attention(2880, 4096, 512)),
    "qwen3-30b-a3b": ModelShape(48, 128, 8, _mlp(2048, 768), _attention(2048, 4096, 512)),
    # compressed attention: 187 million parameters a layer, and a shared expert as large as a routed one
    "deepseek-v3": ModelShape(58, 256, 8, _mlp(7168, 2048, 8), 187_000_000 + _mlp(7168, 2048, 8)),
}

HARDWARE = {
    "rtx3090-pcie4": Hardware(936e9, 25e9, 10e-6),
    "a100-pcie4": Hardware(2039e9, 25e9, 10e-6),
    "h100-pcie5": Hardware(3350e9, 50e9, 10e-6),
}


def link_ratio(shape: ModelShape, hardware: Hardware) -> float:
    """Time to move one expert / time of one layer's compute for one token, which its weights' memory traffic bounds."""
    layer_s = (shape.dense_bytes + shape.active * shape.expert_bytes) / hardware.memory_bytes_s
    return (hardware.link_latency_s + shape.expert_bytes / hardware.link_bytes_s) / layer_s
