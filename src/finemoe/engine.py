"""The life of a layer: ask the policy, move experts, hand them out ready first, let them go.

The engine knows neither a policy's insides nor what is computed with an expert.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from finemoe.errors import ExpertReadError, FinemoeError
from finemoe.metrics import Counters
from finemoe.policy import Controller
from finemoe.store import Pool
from finemoe.types import ExpertId, Landed, Plan, Routed, Transfer

Verifier = Callable[[ExpertId, int], None]


class Engine:
    """Serves experts to layers out of a pool. One layer at a time.

    Args:
        pool: the slots; starts empty.
        controller: decides; starts empty, with the pool's number of slots as capacity.
        transfer: moves bytes into slots.
        verify: called with every landed expert and its slot; raises if the slot's bytes are not that expert's.
        clock: seconds, for the stall time.
    """

    def __init__(
        self,
        pool: Pool,
        controller: Controller,
        transfer: Transfer,
        verify: Verifier | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.pool = pool
        self.controller = controller
        self.transfer = transfer
        self.counters = Counters()
        self._verify = verify
        self._clock = clock
        self._broken_off = False  # a layer was left in the middle, and clearing up after it was interrupted too

    def serve(self, layer: int, experts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yields `(expert, slot)` for each of a layer's experts, ready ones first, each exactly once.

        A slot holds its expert from when it is yielded until the next step of the iterator. An iterator that is not
        run to its end (an error in between, Ctrl-C) empties the pool: nothing half-done is ever reused.

        Args:
            layer: which MoE layer.
            experts: ascending and distinct.

        Raises:
            ExpertReadError: an expert's bytes can't be read.
        """
        if self._broken_off:
            self.clear()
        try:
            self._settle(self.transfer.poll(), {})
            pending: dict[ExpertId, None] = {}
            ready: deque[tuple[ExpertId, int]] = deque()
            for needed in [ExpertId(layer, expert) for expert in experts]:
                if self.controller.is_resident(needed):
                    self.counters.hits += 1
                    ready.append((needed, self.pool.pin(needed)))
                else:
                    self.counters.late += self.controller.is_in_flight(needed)
                    self.counters.misses += not self.controller.is_in_flight(needed)
                    pending[needed] = None
            self._execute(self.controller.routed(Routed(layer, tuple(experts))))
            while ready or pending:
                if not ready:
                    ready.extend(self._settle(self._wait(), pending))
                    continue
                expert, slot = ready.popleft()
                yield expert.expert, slot
                self.pool.unpin(expert)
                self._execute(self.controller.used(expert))
                ready.extend(self._settle(self.transfer.poll(), pending))
        except BaseException:
            self.clear()
            raise

    def clear(self) -> None:
        """Empty the pool. Nothing must be using it."""
        self._broken_off = True
        self.transfer.cancel()
        self.pool.clear()
        self.controller.clear()
        self._broken_off = False

    def check_integrity(self) -> None:
        """Raises `InvariantError` if pool and controller disagree with themselves or each other."""
        self.pool.check_integrity()
        self.controller.check_integrity()

    def _execute(self, plan: Plan) -> None:
        for fetch in plan.fetches:
            slot = self.pool.reserve(fetch.expert, fetch.victim)
            self.counters.evictions += fetch.victim is not None
            self.transfer.submit(fetch.expert, self.pool.writable(slot), urgent=fetch.urgent)

    def _wait(self) -> list[Landed]:
        start_s, start_bytes = self._clock(), self.transfer.moved_bytes
        landed = self.transfer.wait()
        self.counters.stall_s += self._clock() - start_s
        self.counters.stalled_bytes += self.transfer.moved_bytes - start_bytes
        return landed

    def _settle(self, landed: list[Landed], pending: dict[ExpertId, None]) -> list[tuple[ExpertId, int]]:
        """Books what landed. Returns those that the layer waits for, pinned."""
        ready = []
        for expert, error in landed:
            if error is not None:
                raise self._failure(expert, error)
            self.pool.landed(expert)
            slot = self.pool.pin(expert)
            if self._verify is not None:
                self._verify(expert, slot)
            if expert in pending:
                del pending[expert]
                ready.append((expert, slot))
            else:
                self.pool.unpin(expert)
            self._execute(self.controller.landed(expert))
        return ready

    def _failure(self, expert: ExpertId, error: Exception) -> Exception:
        if not isinstance(error, OSError) or isinstance(error, FinemoeError):
            return error
        place = f"{error.filename}: " if error.filename else ""
        return ExpertReadError(
            f"{place}can't read expert {expert.expert} of MoE layer {expert.layer}: {error.strerror or error}"
        )
