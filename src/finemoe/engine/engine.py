"""Serves one MoE layer: submits loads of missing experts, yields experts as they become ready, unpins them after use.

The engine connects a `CacheManager` (decides), a `Transfer` (moves bytes) and a `SlotPool` (owns the slots). It knows
neither how a policy decides nor what is computed with an expert.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from finemoe.engine.layer_timing import LayerTiming
from finemoe.errors import ExpertReadError, FinemoeError
from finemoe.metrics import Counters
from finemoe.policy import CacheManager
from finemoe.policy.cache_state import LOADING, RESIDENT
from finemoe.store import SlotPool
from finemoe.types import Cancelled, ExpertId, Landed, Plan, Routed, Step, Transfer

Verifier = Callable[[ExpertId, int], None]
ChooseHostComputed = Callable[[Sequence[int]], Collection[int]]


class Engine:
    """Serves experts to layers from a bounded pool, one layer at a time.

    The transfer requests prefetches from its own threads while the link is idle. So pool and cache manager are only
    used under the engine's lock, which is never held while computing or waiting.

    Args:
        pool: the slots, in RAM or on devices; starts empty.
        cache_manager: decides what to load and evict; starts empty, with the pool's number of slots as capacity.
        transfer: moves bytes into slots.
        verify: called with every landed expert and its slot; raises if the slot does not hold that expert's bytes.
        clock: in seconds; for stall time and layer timing.
        experts: `L * E`. Once all of them are resident, or have a slot and none was missed in the last iteration, the
            policy has nothing to decide and is not called. `None`: it always is.

    Attributes:
        deciding: whether the policy observes the current iteration.
        layer_timing: `None` unless attached, by `finemoe bench`.
    """

    def __init__(
        self,
        pool: SlotPool,
        cache_manager: CacheManager,
        transfer: Transfer,
        verify: Verifier | None = None,
        clock: Callable[[], float] = time.perf_counter,
        experts: int | None = None,
    ) -> None:
        self.pool = pool
        self.cache_manager = cache_manager
        self.transfer = transfer
        self.counters = Counters()
        self.layer_timing: LayerTiming | None = None
        self.deciding = True
        self._verify = verify
        self._clock = clock
        self._experts = experts
        self._last_misses = -1  # misses and late hits up to the previous iteration
        self._lock = threading.RLock()
        self._prefetching: dict[ExpertId, None] = {}  # in flight and not needed yet, in order of submission
        self._preload: tuple[ExpertId, ...] = ()  # to load into free slots, in order
        self._preload_next = 0  # index into these
        self._preloading: set[ExpertId] = set()  # of these, in flight and not needed yet; never cancelled
        self._needs_clear = False  # `clear` was interrupted
        self._held: list[ExpertId] = []  # pinned by `hold`
        if cache_manager.policy.prefetches:
            transfer.when_idle = self._prefetch

    @property
    def lock(self) -> threading.RLock:
        """Hold it to read several counters consistently: prefetches continue between requests."""
        return self._lock

    def preload(self, experts: Sequence[ExpertId]) -> None:
        """From now on, while the link is idle, loads these into free slots, whatever their prefetch priority."""
        with self._lock:
            self._preload = tuple(experts)
            self._preload_next = 0
            self.transfer.when_idle = self._prefetch
        self.transfer.wake()

    def begin(self, steps: Sequence[Step]) -> None:
        """An iteration begins, with one step per running request."""
        with self._lock:
            was_deciding, self.deciding = self.deciding, not self._nothing_to_decide()
            if self.deciding or was_deciding:
                self.cache_manager.begin(steps if self.deciding else ())
        self._wake()

    def end(self) -> None:
        """The iteration is over: all its layers were served."""
        with self._lock:
            if self.deciding:
                self.cache_manager.end()
        self._wake()

    def serve(self, event: Routed) -> Iterator[tuple[int, int]]:
        """Yields `(expert, slot)` for each of a layer's experts, ready ones first, each exactly once.

        A slot holds its expert from when it is yielded until the next step of the iterator. An iterator that is not
        exhausted (an error in between, Ctrl-C) empties the pool, so that no partly written slot is ever used.

        Args:
            event: the layer, and the experts that it needs.

        Raises:
            ExpertReadError: an expert's bytes can't be read.
        """
        if self._needs_clear:
            self.clear()
        stalled_s = self.counters.stall_s
        if self.layer_timing is not None:
            self.layer_timing.layer_routed(event.layer, self._clock())
        try:
            pending: dict[ExpertId, None] = {}
            ready = self._route(event, pending)
            if not pending and (self.transfer.when_idle is None or not self._may_prefetch()):
                # nothing can take a slot before the layer ends: unpin all at once
                for expert, slot in ready:
                    yield expert.expert, slot
                self._release(ready)
                ready.clear()
            while ready or pending:
                if not ready:
                    ready.extend(self._handle_landed(self._wait(), pending))
                    continue
                expert, slot = ready.popleft()
                yield expert.expert, slot
                with self._lock:
                    self.pool.unpin(expert)
                    self._execute(self.cache_manager.used(expert))
                if landed := self.transfer.poll():
                    ready.extend(self._handle_landed(landed, pending))
                self._wake()
            if self.layer_timing is not None:
                self.layer_timing.layer_done(event.layer, self._clock(), self.counters.stall_s - stalled_s)
        except BaseException:
            self.clear()
            raise

    def serve_waves(
        self, event: Routed, computed_on_host: ChooseHostComputed | None = None
    ) -> Iterator[list[tuple[int, int]]]:
        """`serve` for devices, which run asynchronously. Yields waves: all experts that are ready at that moment.

        Before the next step of the iterator its caller must have launched the kernels that read a wave's slots, and
        recorded their end in the pool. No stall is counted here: devices measure theirs by events.

        Args:
            event: the layer, and the experts that it needs.
            computed_on_host: called with the missing experts; those that it returns are computed on the host, and
                neither loaded nor yielded.

        Raises:
            ExpertReadError: an expert's bytes can't be read.
        """
        if self._needs_clear:
            self.clear()
        try:
            pending: dict[ExpertId, None] = {}
            ready = list(self._route(event, pending, computed_on_host))
            while ready or pending:
                if not ready:
                    ready += self._handle_landed(self.transfer.wait(), pending)
                    continue
                wave, ready = ready, []
                yield [(expert.expert, slot) for expert, slot in wave]
                self._release(wave)
                ready += self._handle_landed(self.transfer.poll(), pending)
                self._wake()
        except BaseException:
            self.clear()
            raise

    def hold(self, event: Routed) -> None:
        """Blocks until all of a layer's experts are resident. They stay pinned until `release` or the next `hold`.

        For a backend that computes a whole layer at once: the pool must have a slot for each of `event.experts`.

        Args:
            event: the layer, and the experts that it needs.

        Raises:
            ExpertReadError: an expert's bytes can't be read; the pool is emptied.
        """
        if self._needs_clear:
            self.clear()
        self.release()
        try:
            pending: dict[ExpertId, None] = {}
            self._held += (expert for expert, _ in self._route(event, pending))
            while pending:
                self._held += (expert for expert, _ in self._handle_landed(self._wait(), pending))
        except BaseException:
            self.clear()
            raise
        self.counters.layer_calls += 1

    @property
    def all_resident(self) -> bool:
        """Whether every expert is in the pool: then none is evicted, and `hold` has nothing to do."""
        return self.pool.resident == self._experts

    def count_resident(self, layers: int, experts: int) -> None:
        """Count a pass that ran without `hold`, as all experts are resident."""
        self.counters.layer_calls += layers
        self.counters.hits += experts

    def release(self) -> None:
        """Nothing is computed with what `hold` has pinned any more."""
        with self._lock:
            for expert in self._held:
                self.pool.unpin(expert)
                self._execute(self.cache_manager.used(expert))
            self._held.clear()

    def clear(self) -> None:
        """Cancels all transfers and empties the pool. No slot may be in use."""
        with self._lock:
            self._needs_clear = True
            self._held.clear()
            self.transfer.cancel_all()
            self.pool.clear()
            self.cache_manager.clear()
            self._prefetching.clear()
            self._preloading.clear()
            self._preload_next = 0
            self._last_misses = -1
            if self.layer_timing is not None:
                self.layer_timing.discard_layer()
            self._needs_clear = False

    def check_integrity(self) -> None:
        """Raises `InvariantError` if pool or cache manager is inconsistent."""
        with self._lock:
            self.pool.check_integrity()
            self.cache_manager.check_integrity()

    def _nothing_to_decide(self) -> bool:
        """Whether all experts are resident, or have a slot and none was missed in the last iteration."""
        last_misses, self._last_misses = self._last_misses, self.counters.misses + self.counters.late
        if self._experts is None:
            return False
        return self.pool.resident == self._experts or (
            self.pool.slots >= self._experts and last_misses == self._last_misses
        )

    def _may_prefetch(self) -> bool:
        """Whether a prefetch may start, if the transfer asks for one."""
        return self.deciding or self._preload_next < len(self._preload)

    def _wake(self) -> None:
        """Wakes idle readers, as there may be something new to prefetch; skipped when there can't be."""
        if self._may_prefetch():
            self.transfer.wake()

    def _route(
        self, event: Routed, pending: dict[ExpertId, None], computed_on_host: ChooseHostComputed | None = None
    ) -> deque[tuple[ExpertId, int]]:
        """Routing is known: pins resident experts, submits demand loads, cancels prefetches that lost their priority.

        Returns the resident ones with their slots. Adds the others to `pending`.
        """
        if landed := self.transfer.poll():
            self._handle_landed(landed, {})
        ready: deque[tuple[ExpertId, int]] = deque()
        missing: list[int] = []
        with self._lock:
            statuses = self.cache_manager.statuses(event.layer)
            for index in event.experts:
                needed = ExpertId(event.layer, int(index))
                if (status := statuses[needed.expert]) == RESIDENT:
                    slot = self.pool.pin(needed)
                    arrived = self.pool.has_arrived(slot)
                    self.counters.hits += arrived
                    self.counters.late += not arrived
                    ready.append((needed, slot))
                    continue
                pending[needed] = None
                if status == LOADING:
                    self.counters.late += 1
                    self._prefetching.pop(needed, None)
                    self._preloading.discard(needed)
                    self.transfer.promote(needed)
                else:
                    self.counters.misses += 1
                    missing.append(needed.expert)
            on_host = computed_on_host(missing) if computed_on_host is not None and missing else ()
            self.counters.computed_on_host += len(on_host)
            for index in on_host:
                del pending[ExpertId(event.layer, index)]
            self._execute(self.cache_manager.routed(event, observe=self.deciding, computed_on_host=on_host))
            for expert in self._prefetching:
                if not self.cache_manager.should_continue_prefetch(expert) or self.cache_manager.short_of_slots:
                    self.transfer.cancel(expert)
            if landed := self.transfer.poll():
                ready.extend(self._handle_landed(landed, pending))
        self._wake()
        return ready

    def _release(self, used: Iterable[tuple[ExpertId, int]]) -> None:
        """Unpins experts after use; demand loads that wait for a slot may take theirs."""
        with self._lock:
            for expert, _ in used:
                self.pool.unpin(expert)
                self._execute(self.cache_manager.used(expert))

    def _prefetch(self, device: int = 0) -> None:
        """The link of a device is idle. Called by the transfer, from one of its threads."""
        with self._lock:
            self._handle_landed(self.transfer.poll(self._prefetching), {})
            fetch = self.cache_manager.prefetch(device)
            if fetch is not None:
                self._prefetching[fetch.expert] = None
                self._execute(Plan((fetch,)))
                return
            while self._preload_next < len(self._preload):
                expert = self._preload[self._preload_next]
                self._preload_next += 1
                if (fetch := self.cache_manager.prefetch_if_free(expert)) is not None:
                    self._preloading.add(expert)
                    self._execute(Plan((fetch,)))
                    return

    def _execute(self, plan: Plan) -> None:
        for fetch in plan.fetches:
            slot = self.pool.reserve(fetch.expert, fetch.victim)
            self.counters.evictions += fetch.victim is not None
            self.transfer.submit(fetch.expert, self.pool.writable(slot), urgent=fetch.urgent)

    def _wait(self) -> list[Landed]:
        start_s, start_bytes = self._clock(), self.transfer.waited_bytes
        landed = self.transfer.wait()
        self.counters.stall_s += self._clock() - start_s
        self.counters.stalled_bytes += int(self.transfer.waited_bytes - start_bytes)
        return landed

    def _handle_landed(self, landed: list[Landed], pending: dict[ExpertId, None]) -> list[tuple[ExpertId, int]]:
        """Makes landed experts resident and frees the slots of failed prefetches.

        Returns those that were in `pending`, pinned, with their slots.
        """
        ready = []
        for expert, error in landed:
            with self._lock:
                if error is not None:
                    is_prefetch = expert in self._prefetching or expert in self._preloading
                    if not isinstance(error, Cancelled) and not is_prefetch:
                        raise self._read_error(expert, error)
                    self._handle_failed_prefetch(expert)
                    continue
                self._prefetching.pop(expert, None)
                self._preloading.discard(expert)
                self.pool.landed(expert)
                slot = self.pool.pin(expert)
                if self._verify is not None:
                    self._verify(expert, slot)
                if expert in pending:
                    del pending[expert]
                    ready.append((expert, slot))
                else:
                    self.pool.unpin(expert)
                self._execute(self.cache_manager.landed(expert))
        return ready

    def _handle_failed_prefetch(self, expert: ExpertId) -> None:
        """Frees the slot of a cancelled or failed prefetch; the next demand load retries, or reports the error."""
        self._prefetching.pop(expert, None)
        self._preloading.discard(expert)
        self.pool.failed(expert)
        self.cache_manager.failed(expert)
        self._execute(self.cache_manager.retry())

    def _read_error(self, expert: ExpertId, error: Exception) -> Exception:
        if not isinstance(error, OSError) or isinstance(error, FinemoeError):
            return error
        place = f"{error.filename}: " if error.filename else ""
        return ExpertReadError(
            f"{place}can't read expert {expert.expert} of MoE layer {expert.layer}: {error.strerror or error}"
        )
