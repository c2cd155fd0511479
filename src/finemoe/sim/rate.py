"""The link ratios that a configuration asks for: given, or out of sizes and rates."""

from __future__ import annotations

from finemoe.sim.config import SimulateConfig
from finemoe.sim.presets import HARDWARE, SHAPES, Hardware, link_ratio


def link_ratios(config: SimulateConfig) -> tuple[float, ...]:
    """`r` = time to move one expert / time of one layer's compute for one token. `disk` is measured now.

    Raises:
        FinemoeError: there is no room to measure the disk.
    """
    if config.hardware is None or config.shape is None:
        return config.link_ratios
    hardware = HARDWARE.get(config.hardware) or _this_machine()
    return (link_ratio(SHAPES[config.shape], hardware),)


def _this_machine() -> Hardware:
    from finemoe.forecast import measure

    rates = measure()
    return Hardware(rates.memory_bytes_s, rates.disk_bytes_s, 0.0)
