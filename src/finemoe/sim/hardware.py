"""The modelled machine, its random times, and presets: published hardware rates and model shapes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from finemoe.policy.cache_state import Scores

TIMING = (
    "before_gate", "gap", "lag", "begin_lag", "prefetch_slowdown", "compute_spread", "link_spread", "lag_spread",
)  # fmt: skip # of Machine; every row of a sweep repeats them
_TRANSFERS = 1 << 16  # factors drawn; longer runs reuse them


@dataclass(frozen=True)
class Machine:
    """The modelled machine. Times are in units of one layer's compute for one token.

    A spread is the standard deviation of a time's logarithm: times are log-normal with an unchanged mean, drawn
    independently.

    Attributes:
        capacity: `C`, expert slots of all devices together.
        link_ratio: time to transfer one expert, latency included.
        devices: each has its own link and an equal part of the slots; experts are assigned round-robin.
        chunks: pieces of a transfer; a prefetch is preempted only between two. 0: at any time.
        ready_first: experts compute as they arrive; otherwise all together once the last is resident.
        tokens_per_unit: tokens that a layer computes in the time of one; more take proportionally longer.
        before_gate: share of a layer's compute before its gate.
        gap: time from the last layer of an iteration to the first of the next; links keep transferring.
        lag: time that an asynchronous policy searches after a gate before its scores take effect. A search still
            running at the next event is superseded; the next one starts when it ends.
        begin_lag: the same for the begin of an iteration; `None`: as `lag`.
        prefetch_slowdown: a prefetch takes this many times the link ratio.
        compute_spread: of a layer's compute, before and after its gate.
        link_spread: of the link ratio.
        lag_spread: of both lags.
        seed: of the random times.
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
    """Random factors with mean 1 for a machine's times, determined by its seed.

    Attributes:
        transfers: `[n]`, of transfers in order, reused cyclically.
    """

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        transfers, self._computes, self._lags = np.random.default_rng(machine.seed).spawn(3)
        self.transfers = _factors(machine.link_spread, transfers, _TRANSFERS if machine.link_spread else 1)

    def computes(self, layers: int) -> Scores:
        """Factors `[2, L]` of the next iteration's compute: before and after each gate."""
        return _factors(self._machine.compute_spread, self._computes, 2 * layers).reshape(2, layers)

    def lag(self) -> float:
        """The factor of the next event's lag."""
        return float(_factors(self._machine.lag_spread, self._lags, 1)[0])


def _factors(spread: float, random: np.random.Generator, count: int) -> Scores:
    if spread == 0:
        return np.ones(count)
    return np.exp(random.normal(-spread * spread / 2, spread, count))


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model's MoE layers."""

    layers: int  # L
    experts: int  # E
    active: int  # K
    expert_bytes: int
    dense_bytes: int  # attention, shared experts, norms and router of one layer


@dataclass(frozen=True)
class Hardware:
    """Rates of a device and its link."""

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
    # latent attention of 187 million parameters, and a shared expert as large as a routed one
    "deepseek-v3": ModelShape(58, 256, 8, _mlp(7168, 2048, 8), 187_000_000 + _mlp(7168, 2048, 8)),
}

HARDWARE = {
    "rtx3090-pcie4": Hardware(936e9, 25e9, 10e-6),
    "a100-pcie4": Hardware(2039e9, 25e9, 10e-6),
    "h100-pcie5": Hardware(3350e9, 50e9, 10e-6),
}


def link_ratio(shape: ModelShape, hardware: Hardware) -> float:
    """Time to transfer one expert / time of one layer's compute for one token, which reading its weights bounds."""
    layer_s = (shape.dense_bytes + shape.active * shape.expert_bytes) / hardware.memory_bytes_s
    return (hardware.link_latency_s + shape.expert_bytes / hardware.link_bytes_s) / layer_s
