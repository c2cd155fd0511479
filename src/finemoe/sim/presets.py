"""Sizes of known models and rates of known machines, from which a link ratio follows.

Sources: the models' published configs (experts and dense part of one MoE layer, in the precision of their release);
the vendors' data sheets for memory bandwidth; for PCIe the rate that pinned copies reach in practice, about 80% of
the nominal one.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
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
    "mixtral-8x7b": Shape(32, 8, 2, _mlp(4096, 14336), _attention(4096, 4096, 1024)),
    "qwen1.5-moe": Shape(24, 60, 4, _mlp(2048, 1408), _attention(2048, 2048, 2048) + _mlp(2048, 5632)),
    "phi-3.5-moe": Shape(32, 16, 2, _mlp(4096, 6400), _attention(4096, 4096, 1024)),
    "gpt-oss-20b": Shape(24, 32, 4, _mlp(2880, 2880, 4.25), _attention(2880, 4096, 512)),
    "qwen3-30b-a3b": Shape(48, 128, 8, _mlp(2048, 768), _attention(2048, 4096, 512)),
    # compressed attention: 187 million parameters a layer, and a shared expert as large as a routed one
    "deepseek-v3": Shape(58, 256, 8, _mlp(7168, 2048, 8), 187_000_000 + _mlp(7168, 2048, 8)),
}

HARDWARE = {
    "rtx3090-pcie4": Hardware(936e9, 25e9, 10e-6),
    "a100-pcie4": Hardware(2039e9, 25e9, 10e-6),
    "h100-pcie5": Hardware(3350e9, 50e9, 10e-6),
}


def link_ratio(shape: Shape, hardware: Hardware) -> float:
    """Time to move one expert / time of one layer's compute for one token, which its weights' memory traffic bounds."""
    layer_s = (shape.dense_bytes + shape.active * shape.expert_bytes) / hardware.memory_bytes_s
    return (hardware.link_latency_s + shape.expert_bytes / hardware.link_bytes_s) / layer_s
