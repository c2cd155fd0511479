"""A link of a given bandwidth, as times: when each piece may begin to move, and when the last byte of it has come.

The link moves one piece at a time. A piece begins when the link is free and the piece was asked for, whenever its
reader woke up to it, so that late wake-ups cost nothing over a second.
"""

from __future__ import annotations

LAG_S = 0.05  # what a reader that was late, or a disk that was slow, may catch up with


class Pace:
    """Not safe for threads: used under the lock of its transfer.

    Args:
        bandwidth_bytes_s: of the link.
    """

    def __init__(self, bandwidth_bytes_s: float) -> None:
        self.bandwidth_bytes_s = bandwidth_bytes_s
        self._free_s = 0.0

    def delay_s(self, now_s: float) -> float:
        """For how long the link still moves the piece before; 0 or less: a piece may begin."""
        return self._free_s - now_s

    def begin(self, length_bytes: int, asked_s: float, now_s: float) -> float:
        """A piece begins. Returns when it has come; it must not be handed out before."""
        self._free_s = max(self._free_s, asked_s, now_s - LAG_S) + length_bytes / self.bandwidth_bytes_s
        return self._free_s
