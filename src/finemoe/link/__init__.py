"""The way from host memory to devices: queues, copy streams, and the disk behind them."""

from finemoe.link.lane import Piece, cut
from finemoe.link.transfer import Link

__all__ = ["Link", "Piece", "cut"]
