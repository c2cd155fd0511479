"""Link utilisation by wall clock, demand loads and prefetches apart, and a bandwidth throttle for experiments."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from finemoe.metrics import NEVER, Durations

ReadStart = tuple[float, float, float]  # of a read: its start, and `urgent_s` and `prefetch_s` at that time
CATCH_UP_S = 0.05  # how far a throttled link may catch up after a late reader or a slow disk


@dataclass(frozen=True)
class LinkTotals:
    """Time in which a link had experts in flight, and the bytes that it moved in that time.

    Attributes:
        urgent_s: time with at least one demand load in flight.
        urgent_bytes: bytes moved in that time, for demand loads; a read counts by the share of its time.
        prefetch_s: time with prefetches in flight and no demand load.
        prefetch_bytes: bytes moved in that time.
        passages: durations of prefetches that no other demand load delayed.
    """

    urgent_s: float = 0.0
    urgent_bytes: float = 0.0
    prefetch_s: float = 0.0
    prefetch_bytes: float = 0.0
    passages: Durations = NEVER

    def __sub__(self, other: LinkTotals) -> LinkTotals:
        """The increase since `other`."""
        return LinkTotals(**{name: getattr(self, name) - getattr(other, name) for name in LINK_TOTALS})


LINK_TOTALS = tuple(each.name for each in fields(LinkTotals))


@dataclass(eq=False)
class TransferRecord:
    """An accounted expert in flight."""

    start_s: float
    urgent_s_at_start: float  # `LinkAccounting.urgent_s` at that time
    urgent: bool
    undisturbed: bool = False  # a promoted prefetch: no other demand load was in flight before it was promoted


@dataclass
class LinkAccounting:
    """Accounts the time and bytes of one link; see `LinkTotals`. Not thread-safe: used under its transfer's lock.

    Time to wake readers and to choose a prefetch is included: the link is not free for others meanwhile.
    """

    urgent_s: float = field(default=0.0, init=False)
    urgent_bytes: float = field(default=0.0, init=False)
    prefetch_s: float = field(default=0.0, init=False)
    prefetch_bytes: float = field(default=0.0, init=False)
    passages: Durations = field(default=NEVER, init=False)
    _urgent: int = field(default=0, init=False)  # demand loads in flight
    _prefetches: int = field(default=0, init=False)  # prefetches in flight
    _counted_s: float = field(default=0.0, init=False)  # time is counted up to this
    _landed_s: float = field(default=0.0, init=False)  # when an expert last landed

    def advance(self, now_s: float) -> None:
        """Count the time up to `now_s`."""
        if self._urgent:
            self.urgent_s += now_s - self._counted_s
        elif self._prefetches:
            self.prefetch_s += now_s - self._counted_s
        self._counted_s = now_s

    def submit(self, *, urgent: bool, now_s: float, since_s: float) -> TransferRecord:
        """An expert is submitted. On an idle link its time begins at `since_s`, when it began to be chosen."""
        idle = not (self._urgent or self._prefetches)
        since_s = min(now_s, max(self._counted_s, since_s)) if idle else now_s
        self.advance(since_s)
        self._add(urgent, 1)
        self.advance(now_s)
        return TransferRecord(since_s, self.urgent_s, urgent)

    def promote(self, record: TransferRecord | None, now_s: float) -> TransferRecord:
        """A prefetch becomes a demand load; a new record if it had none or was cancelled."""
        if record is None:
            return self.submit(urgent=True, now_s=now_s, since_s=now_s)
        self.cancel(record, now_s)
        record.undisturbed = record.urgent_s_at_start == self.urgent_s
        record.urgent = True
        self._add(record.urgent, 1)
        return record

    def cancel(self, record: TransferRecord, now_s: float) -> None:
        """An expert is not in flight any more."""
        self.advance(now_s)
        self._add(record.urgent, -1)

    def land(self, record: TransferRecord, now_s: float) -> None:
        """An expert is complete."""
        self.cancel(record, now_s)
        if record.undisturbed or (not record.urgent and record.urgent_s_at_start == self.urgent_s):
            self.passages += Durations.one(now_s - max(record.start_s, self._landed_s))
        self._landed_s = now_s

    def begin_read(self, now_s: float) -> ReadStart:
        """A read begins; `end_read` takes the result."""
        self.advance(now_s)
        return now_s, self.urgent_s, self.prefetch_s

    def end_read(self, read_bytes: int, read_start: ReadStart, now_s: float, *, accounted: bool) -> None:
        """A read has ended. Its bytes are split as its time was between demand loads and prefetches.

        Args:
            accounted: the read's expert still has a record; if not, it was cancelled: no demand load's bytes.
        """
        self.advance(now_s)
        start_s, urgent_s, prefetch_s = read_start
        bytes_s = read_bytes / max(now_s - start_s, 1e-9)
        if accounted:
            self.urgent_bytes += (self.urgent_s - urgent_s) * bytes_s
        self.prefetch_bytes += (self.prefetch_s - prefetch_s) * bytes_s

    def clear(self, now_s: float) -> None:
        """Nothing is in flight any more."""
        self.advance(now_s)
        self._urgent = self._prefetches = 0

    def totals(self, now_s: float) -> LinkTotals:
        """Totals up to `now_s`."""
        self.advance(now_s)
        return LinkTotals(**{name: getattr(self, name) for name in LINK_TOTALS})

    def _add(self, urgent: bool, change: int) -> None:  # noqa: FBT001 - selects one of two counters
        if urgent:
            self._urgent += change
        else:
            self._prefetches += change


class Throttle:
    """Limits a link to a bandwidth. Not thread-safe: used under its transfer's lock.

    Args:
        bandwidth_bytes_s: of the link.
    """

    def __init__(self, bandwidth_bytes_s: float) -> None:
        self.bandwidth_bytes_s = bandwidth_bytes_s
        self._free_s = 0.0  # when the link is free again

    def delay_s(self, now_s: float) -> float:
        """Time until the link is free for the next chunk; 0 or less: now."""
        return self._free_s - now_s

    def begin(self, length_bytes: int, submitted_s: float, now_s: float) -> float:
        """A chunk begins. Returns its time of arrival, before which it must not be handed out."""
        self._free_s = max(self._free_s, submitted_s, now_s - CATCH_UP_S) + length_bytes / self.bandwidth_bytes_s
        return self._free_s
