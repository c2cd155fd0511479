"""The life of a layer: ask the policy, move experts, hand them out ready first, let them go.

The engine knows neither a policy's insides nor what is computed with an expert.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence

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
    """Serves experts to layers out of a pool. One layer at a time.

    While the link is idle, the transfer asks for a prefetch from a thread of its own; so pool and controller are only
    touched under the engine's lock, which is never held while computing or waiting.

    Args:
        pool: the slots, of this machine's memory or of devices; starts empty.
        controller: decides; starts empty, with the pool's number of slots as capacity.
        transfer: moves bytes into slots.
        verify: called with every landed expert and its slot; raises if the slot's bytes are not that expert's.
        clock: seconds, for the stall time and the tempo.
        experts: how many there are. Once all of them are resident, or have room and none was missed lately, there is
            nothing to decide, and the policy is not told any more.
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
        self.layer_timing = LayerTiming(cache_manager.policy.layers)
        self._verify = verify
        self._clock = clock
        self._experts = experts
        self.deciding = True  # whether the policy is told of this iteration
        self._missed = -1  # accesses that found nothing, up to the last iteration
        self._lock = threading.RLock()
        self._prefetching: dict[ExpertId, None] = {}  # in flight and not needed yet, in order
        self._preload: tuple[ExpertId, ...] = ()  # to be brought into free slots, in order
        self._preloaded = 0  # how many of these were seen to
        self._preloading: set[ExpertId] = set()  # of these, in flight and not needed yet: never withdrawn
        self._held: list[ExpertId] = []  # pinned by `hold`
        self._broken_off = False  # a layer was left in the middle, and clearing up after it was interrupted too
        if cache_manager.policy.prefetches:
            transfer.when_idle = self._prefetch

    @property
    def lock(self) -> threading.RLock:
        """Held by whoever wants counts that belong together: prefetches go on after an answer."""
        return self._lock

    def preload(self, experts: Sequence[ExpertId]) -> None:
        """From now on, whenever the link is idle, bring these in while there are free slots, wanted or not."""
        with self._lock:
            self._preload = tuple(experts)
            self._preloaded = 0
            self.transfer.when_idle = self._prefetch
        self.transfer.wake()

    def begin(self, steps: Sequence[Step]) -> None:
        """An iteration begins: what the running requests bring to it."""
        with self._lock:
            decided, self.deciding = self.deciding, not self._at_rest()
            if self.deciding or decided:
                self.cache_manager.begin(steps if self.deciding else ())
        self._wake()

    def _at_rest(self) -> bool:
        """Whether there is nothing to decide: all experts are resident, or have room and none was missed lately."""
        missed, self._missed = self._missed, self.counters.misses + self.counters.late
        if self._experts is None:
            return False
        return self.pool.resident == self._experts or (self.pool.slots >= self._experts and missed == self._missed)

    def _wake(self) -> None:
        """What is worth prefetching may have changed; at rest it has not, and waking readers costs the model time."""
        if self.deciding or self._preloaded < len(self._preload):
            self.transfer.wake()

    def end(self) -> None:
        """The iteration is over: all its layers were served."""
        with self._lock:
            if self.deciding:
                self.cache_manager.end()
        self._wake()

    def serve(self, event: Routed) -> Iterator[tuple[int, int]]:
        """Yields `(expert, slot)` for each of a layer's experts, ready ones first, each exactly once.

        A slot holds its expert from when it is yielded until the next step of the iterator. An iterator that is not
        run to its end (an error in between, Ctrl-C) empties the pool: nothing half-done is ever reused.

        Args:
            event: the layer, and the experts that it needs.

        Raises:
            ExpertReadError: an expert's bytes can't be read.
        """
        if self._broken_off:
            self.clear()
        stalled_s = self.counters.stall_s
        self.layer_timing.gate(event.layer, self._clock())
        try:
            pending: dict[ExpertId, None] = {}
            ready = self._route(event, pending)
            while ready or pending:
                if not ready:
                    ready.extend(self._settle(self._wait(), pending))
                    continue
                expert, slot = ready.popleft()
                yield expert.expert, slot
                with self._lock:
                    self.pool.unpin(expert)
                    self._execute(self.cache_manager.used(expert))
                if landed := self.transfer.poll():
                    ready.extend(self._settle(landed, pending))
                self._wake()
            self.layer_timing.end(event.layer, self._clock(), self.counters.stall_s - stalled_s)
        except BaseException:
            self.clear()
            raise

    def serve_waves(
        self, event: Routed, computed_on_host: ChooseHostComputed | None = None
    ) -> Iterator[list[tuple[int, int]]]:
        """`serve` for devices, which compute on their own time: yields all that is ready at once.

        Before the next step of the iterator its caller must have launched what reads the slots of a wave, and told the
        pool. Nothing is counted as stall: what the device waited for, the device knows.

        Args:
            event: the layer, and the experts that it needs.
            elsewhere: told of what misses; what it names is computed elsewhere, and not fetched.

        Raises:
            ExpertReadError: an expert's bytes can't be read.
        """
        if self._broken_off:
            self.clear()
        try:
            pending: dict[ExpertId, None] = {}
            ready = list(self._route(event, pending, computed_on_host))
            while ready or pending:
                if not ready:
                    ready += self._settle(self.transfer.wait(), pending)
                    continue
                wave, ready = ready, []
                yield [(expert.expert, slot) for expert, slot in wave]
                with self._lock:
                    for expert, _ in wave:
                        self.pool.unpin(expert)
                        self._execute(self.cache_manager.used(expert))
                ready += self._settle(self.transfer.poll(), pending)
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
        if self._broken_off:
            self.clear()
        self.release()
        try:
            pending: dict[ExpertId, None] = {}
            self._held += (expert for expert, _ in self._route(event, pending))
            while pending:
                self._held += (expert for expert, _ in self._settle(self._wait(), pending))
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
        """Empty the pool. Nothing must be using it."""
        with self._lock:
            self._broken_off = True
            self._held.clear()
            self.transfer.cancel_all()
            self.pool.clear()
            self.cache_manager.clear()
            self._prefetching.clear()
            self._preloading.clear()
            self._preloaded = 0
            self._missed = -1
            self.layer_timing.break_off()
            self._broken_off = False

    def check_integrity(self) -> None:
        """Raises `InvariantError` if pool and controller disagree with themselves or each other."""
        with self._lock:
            self.pool.check_integrity()
            self.cache_manager.check_integrity()

    def _route(
        self, event: Routed, pending: dict[ExpertId, None], computed_on_host: ChooseHostComputed | None = None
    ) -> deque[tuple[ExpertId, int]]:
        """Books what a layer needs. Returns what is ready, pinned; `pending` becomes what is to come."""
        if landed := self.transfer.poll():
            self._settle(landed, {})
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
            away = computed_on_host(missing) if computed_on_host is not None and missing else ()
            self.counters.computed_on_host += len(away)
            for index in away:
                del pending[ExpertId(event.layer, index)]
            self._execute(self.cache_manager.routed(event, observe=self.deciding, computed_on_host=away))
            for expert in self._prefetching:
                if not self.cache_manager.should_continue_prefetch(expert) or self.cache_manager.short_of_slots:
                    self.transfer.cancel(expert)
            if landed := self.transfer.poll():
                ready.extend(self._settle(landed, pending))
        self._wake()
        return ready

    def _prefetch(self, device: int = 0) -> None:
        """The link of a device is idle. Called by the transfer, from a thread of its own."""
        with self._lock:
            self._settle(self.transfer.poll(self._prefetching), {})
            fetch = self.cache_manager.prefetch(device)
            if fetch is not None:
                self._prefetching[fetch.expert] = None
                self._execute(Plan((fetch,)))
                return
            while self._preloaded < len(self._preload):
                expert = self._preload[self._preloaded]
                self._preloaded += 1
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

    def _settle(self, landed: list[Landed], pending: dict[ExpertId, None]) -> list[tuple[ExpertId, int]]:
        """Books what landed. Returns those that the layer waits for, pinned."""
        ready = []
        for expert, error in landed:
            with self._lock:
                if error is not None:
                    unasked = expert in self._prefetching or expert in self._preloading
                    if not isinstance(error, Cancelled) and not unasked:
                        raise self._failure(expert, error)
                    self._drop(expert)
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

    def _drop(self, expert: ExpertId) -> None:
        """A prefetch was withdrawn, or can't be read: whoever needs it, now or later, will load it, or fail by it."""
        self._prefetching.pop(expert, None)
        self._preloading.discard(expert)
        self.pool.failed(expert)
        self.cache_manager.failed(expert)
        self._execute(self.cache_manager.retry())

    def _failure(self, expert: ExpertId, error: Exception) -> Exception:
        if not isinstance(error, OSError) or isinstance(error, FinemoeError):
            return error
        place = f"{error.filename}: " if error.filename else ""
        return ExpertReadError(
            f"{place}can't read expert {expert.expert} of MoE layer {expert.layer}: {error.strerror or error}"
        )
