"""Memory budgets: `--expert-memory` and other sizes and shares parsed, turned into expert slots, and shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal

from finemoe.errors import BudgetError, ConfigError

_UNITS = {"": 1, "b": 1}
for _power, _prefix in enumerate("kmgt", start=1):
    _UNITS[f"{_prefix}b"] = 1000**_power
    _UNITS[f"{_prefix}ib"] = 1024**_power
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)
_SHARE = re.compile(r"(-?\d+(?:\.\d+)?)\s*%")


@dataclass(frozen=True, slots=True)
class Budget:
    """A memory budget: exactly one of `size_bytes` and `share` (of all routed experts; 1.0 is all of them) is set."""

    size_bytes: int | None = None
    share: float | None = None

    def slots(self, slot_bytes: int, experts: int) -> int:
        """The number of experts of `slot_bytes` that fit, at most `experts`."""
        if self.share is not None:
            return int(self.share * experts + 1e-9)
        assert self.size_bytes is not None
        return min(experts, self.size_bytes // slot_bytes)


def budget_text(given: object, flag: str = "--expert-memory") -> str:
    """A budget as its flag takes it: an `int` is bytes, a `float` a share.

    Raises:
        BudgetError: a float that is not a share, or another type; the message names the flag.
    """
    if isinstance(given, float):
        if not 0 < given <= 1:
            raise BudgetError(f"{flag}: {given!r} is not a share above 0 and at most 1.0; bytes are an int")
        return f"{(Decimal(repr(float(given))) * 100).normalize():f}%"
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise BudgetError(
            f"{flag}: can't use {given!r}; give bytes ('2GiB' or an int), a share ('25%' or the float 0.25) or 'all'"
        )
    return str(given)


def parse_budget(text: str, flag: str = "--expert-memory") -> Budget:
    """Parses `2GiB`, `25%`, `all` or a plain number of bytes.

    Raises:
        BudgetError: none of these, or zero, negative or above 100%; the message names the flag.
    """
    cleaned = text.strip().lower()
    if cleaned == "all":
        return Budget(share=1.0)
    if share := _SHARE.fullmatch(cleaned):
        value = float(share[1])
        if not 0 < value <= 100:
            raise BudgetError(f"{flag}: {text!r} is not a share between 0% and 100% of the routed experts")
        return Budget(share=value / 100)
    if cleaned.startswith("-"):
        raise BudgetError(f"{flag}: {text!r} is negative; give bytes (2GiB), a share (25%) or all")
    size = _read_size(cleaned)
    if size is None:
        raise BudgetError(f"{flag}: can't read {text!r}; give bytes (2GiB, 800MB), a share (25%) or all")
    if size < 1:
        raise BudgetError(f"{flag}: {text!r} is zero; give bytes (2GiB), a share (25%) or all")
    return Budget(size_bytes=int(size))


def parse_bytes(text: str, flag: str) -> int:
    """Parses `2GiB`, `800MB` or a plain number of bytes.

    Raises:
        ConfigError: none of these, or zero; the message names `flag`.
    """
    size = _read_size(text)
    if size is None:
        raise ConfigError(f"{flag}: can't read {text!r}; give bytes (2GiB, 800MB)")
    if size < 1:
        raise ConfigError(f"{flag}: {text!r} is zero; give bytes (2GiB, 800MB)")
    return int(size)


def _read_size(text: str) -> Decimal | None:
    """Bytes, or `None` if `text` is not a size."""
    size = _SIZE.fullmatch(text.strip().lower())
    return None if size is None or size[2] not in _UNITS else Decimal(size[1]) * _UNITS[size[2]]


def format_bytes(count: float) -> str:
    """A number of bytes in binary units: `1.1 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def parse_bandwidth(text: str) -> float:
    """Parses `500MiB`, `1.5GB/s` or a plain number of bytes, in bytes/s.

    Raises:
        ConfigError: none of these, or zero; the message names `--link-bandwidth`.
    """
    size = _read_size(text.strip().lower().removesuffix("/s"))
    if size is None:
        raise ConfigError(f"--link-bandwidth: can't read {text!r}; give bytes per second (500MiB, 1.5GB)")
    if size < 1:
        raise ConfigError(f"--link-bandwidth: {text!r} is zero; give bytes per second (500MiB, 1.5GB)")
    return float(size)
