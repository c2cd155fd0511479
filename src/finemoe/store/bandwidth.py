"""How long a link takes for what is urgent, and for what is not, by the clock of the machine that runs it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from finemoe.metrics import NEVER, Durations

Mark = tuple[float, float, float]  # a time, and what was counted until then, urgent and not


@dataclass(eq=False)
class TransferRecord:
    """An expert on its way."""

    since_s: float
    urgent_before_s: float  # what Traffic.urgent_s was then
    urgent: bool
    alone: bool = False  # a prefetch: nothing else was urgent before it was itself, or had come


@dataclass(frozen=True)
class LinkTotals:
    """Of one link: time in which something was asked of it and had not come, and what it moved in that time.

    Attributes:
        passages: of prefetches that nothing else that was urgent disturbed.
    """

    urgent_s: float = 0.0
    urgent_bytes: float = 0.0
    prefetch_s: float = 0.0
    prefetch_bytes: float = 0.0
    passages: Durations = NEVER

    def __sub__(self, other: LinkTotals) -> LinkTotals:
        """Since the other."""
        return LinkTotals(**{name: getattr(self, name) - getattr(other, name) for name in MOVED})


MOVED = tuple(each.name for each in fields(LinkTotals))


@dataclass
class LinkAccounting:
    """Counts what one link moves; see `LinkTotals`.

    While something urgent is on its way, time and bytes are the urgent's alone. Waking readers, and asking what to
    prefetch, are parts of the time: nothing moves meanwhile, as on a slower link.
    """

    urgent_s: float = field(default=0.0, init=False)
    urgent_bytes: float = field(default=0.0, init=False)
    prefetch_s: float = field(default=0.0, init=False)
    prefetch_bytes: float = field(default=0.0, init=False)
    passages: Durations = field(default=NEVER, init=False)
    _urgent: int = field(default=0, init=False)  # on their way
    _prefetches: int = field(default=0, init=False)
    _counted_s: float = field(default=0.0, init=False)  # up to then
    _landed_s: float = field(default=0.0, init=False)  # when something last came

    def count(self, now_s: float) -> None:
        """Time has passed."""
        if self._urgent:
            self.urgent_s += now_s - self._counted_s
        elif self._prefetches:
            self.prefetch_s += now_s - self._counted_s
        self._counted_s = now_s

    def send(self, *, urgent: bool, now_s: float, since_s: float) -> TransferRecord:
        """An expert is sent for; if the link was idle, its time began a little earlier."""
        idle = not (self._urgent or self._prefetches)
        since_s = min(now_s, max(self._counted_s, since_s)) if idle else now_s
        self.count(since_s)
        self._add(urgent, 1)
        self.count(now_s)
        return TransferRecord(since_s, self.urgent_s, urgent)

    def promote(self, passage: TransferRecord, now_s: float) -> None:
        """A prefetch becomes urgent."""
        self.drop(passage, now_s)
        passage.alone = passage.urgent_before_s == self.urgent_s
        passage.urgent = True
        self._add(passage.urgent, 1)

    def drop(self, passage: TransferRecord, now_s: float) -> None:
        """An expert will not come."""
        self.count(now_s)
        self._add(passage.urgent, -1)

    def land(self, passage: TransferRecord, now_s: float) -> None:
        """An expert has come."""
        self.drop(passage, now_s)
        if passage.alone or (not passage.urgent and passage.urgent_before_s == self.urgent_s):
            self.passages += Durations.one(now_s - max(passage.since_s, self._landed_s))
        self._landed_s = now_s

    def mark(self, now_s: float) -> Mark:
        """A read begins."""
        self.count(now_s)
        return now_s, self.urgent_s, self.prefetch_s

    def move(self, moved_bytes: int, mark: Mark, now_s: float, *, wanted: bool) -> None:
        """A read that began at the mark has ended. What it moved is whose the time was; unless it was withdrawn."""
        self.count(now_s)
        since_s, urgent_s, prefetch_s = mark
        bytes_s = moved_bytes / max(now_s - since_s, 1e-9)
        if wanted:
            self.urgent_bytes += (self.urgent_s - urgent_s) * bytes_s
        self.prefetch_bytes += (self.prefetch_s - prefetch_s) * bytes_s

    def clear(self, now_s: float) -> None:
        """Nothing is on its way any more."""
        self.count(now_s)
        self._urgent = self._prefetches = 0

    def totals(self, now_s: float) -> LinkTotals:
        """Up to now."""
        self.count(now_s)
        return LinkTotals(**{name: getattr(self, name) for name in MOVED})

    def _add(self, urgent: bool, change: int) -> None:  # noqa: FBT001 - which of two
        if urgent:
            self._urgent += change
        else:
            self._prefetches += change


LAG_S = 0.05  # what a reader that was late, or a disk that was slow, may catch up with


class Throttle:
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
