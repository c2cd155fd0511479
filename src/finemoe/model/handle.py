"""`model.finemoe`: statistics, learned maps and closing of an offloaded model."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from finemoe.checkpoint import Checkpoint, ExpertIndex
from finemoe.config import LoadConfig
from finemoe.engine.async_policy import AsyncPolicy, PolicyTimings
from finemoe.engine.engine import Engine
from finemoe.engine.layer_timing import LayerTiming
from finemoe.errors import ConfigError, DamagedMapsError, FinemoeError, MapsError
from finemoe.learned import MapPersistence, Maps
from finemoe.learned.file import check_arrays
from finemoe.metrics import ExplainRow, PerExpert, Stats
from finemoe.policy import accounting
from finemoe.policy import cache_state as cache
from finemoe.store import DiskStore
from finemoe.store.bandwidth import LinkTotals
from finemoe.store.reader_threads import ReaderThreads
from finemoe.system import peak_rss_bytes
from finemoe.types import Recorded

if TYPE_CHECKING:  # these import torch and transformers, which a GGUF model needs nothing of
    from finemoe.engine.expert_layer import ExpertLayer
    from finemoe.gpu.setup import DeviceTiers
    from finemoe.model.observer import ForcedGates, Observer


class ModelHandle:
    """Controls an offloaded model while it runs; available as `model.finemoe`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        expert_index: ExpertIndex,
        store: DiskStore,
        engine: Engine,
        layers: list[ExpertLayer],
        lock: threading.RLock,
        config: LoadConfig,
        *,
        map_persistence: MapPersistence | None = None,
        observer: Observer | None = None,
        tiers: DeviceTiers | None = None,
        fingerprint: str | None = None,
        resources: ExitStack | None = None,
    ) -> None:
        self.observer = observer  # None if the policy uses no gates
        self.checkpoint = checkpoint
        self.expert_index = expert_index
        self.policy = config.policy
        self.fingerprint = fingerprint  # of the model; None if the policy learns nothing
        self.lossy = config.lossy
        self.link_bandwidth_bytes_s = config.link_bandwidth_bytes_s
        self._store = store
        self._engine = engine
        self._layers = layers
        self._lock = lock
        self._map_persistence = map_persistence
        self.replayed_routing: str | None = None  # path of the trace whose routing is forced onto the model
        self._tiers = tiers
        self._resources = resources  # of another backend; they own store, pool and transfer
        self._closed = False
        # totals at the last reset_stats
        self._moved_bytes_at_reset = 0
        self._link_totals_at_reset = self._link_totals()
        self._disk_bytes_at_reset = 0

    def stats(self) -> Stats:
        """Statistics since loading, or since `reset_stats`."""
        with self._engine.lock:
            return self._stats()

    def _stats(self) -> Stats:
        if self._tiers is not None:
            self._tiers.collect_counters()
        policy = self._engine.cache_manager.policy
        counters, pool = self._engine.counters, self._engine.pool
        cache_counters = self._engine.cache_manager.cache.counters
        source_counts = self._engine.cache_manager.source_counts
        return Stats(
            model=self.checkpoint.name,
            policy=self.policy,
            io=self._store.io,
            link_bandwidth_bytes_s=self.link_bandwidth_bytes_s,
            layers=len(self.expert_index.layouts),
            experts=self.expert_index.experts,
            expert_bytes=self.expert_index.weight_bytes,
            expert_dtype=self.expert_index.stored_dtype,
            lossy=self.lossy,
            expert_memory_bytes=pool.size_bytes,
            slots=pool.slots,
            resident=pool.resident,
            layer_calls=counters.layer_calls,
            hits=counters.hits,
            late=counters.late,
            misses=counters.misses,
            evictions=counters.evictions,
            prefetched=int(cache_counters[cache.PREFETCHED]),
            prefetched_used=int(cache_counters[cache.PREFETCHED_USED]),
            wasted=int(cache_counters[cache.WASTED]),
            regretted=int(cache_counters[cache.REGRETTED]),
            paused=int(cache_counters[cache.THROTTLED]),
            searches=policy.searches if isinstance(policy, AsyncPolicy) else 0,
            searches_late=policy.dropped if isinstance(policy, AsyncPolicy) else 0,
            bytes_read=self._engine.transfer.moved_bytes - self._moved_bytes_at_reset,
            stall_s=counters.stall_s,
            stalled_bytes=counters.stalled_bytes,
            peak_rss_bytes=peak_rss_bytes() - pool.mapped_twice_bytes,
            explained=None if source_counts is None else source_counts.rows(),
            replayed_routing=self.replayed_routing,
            device=self.device,
            expert_kernel=self._kernel(),
            host_memory_bytes=0 if self._tiers is None else self._tiers.host_memory_bytes,
            disk_bytes=self._disk_bytes() - self._disk_bytes_at_reset,
            host_computed=counters.computed_on_host,
        )

    @property
    def layer_timing(self) -> LayerTiming:
        """Time spent in and between layers since loading, or since `reset_stats`; all 0 without `attach_timing`."""
        return self._engine.layer_timing or LayerTiming(self._engine.cache_manager.policy.layers)

    @property
    def policy_timings(self) -> PolicyTimings:
        """Time an asynchronous policy took per event, since then; all 0 for others, and without `attach_timing`."""
        policy = self._engine.cache_manager.policy
        return (policy.timings if isinstance(policy, AsyncPolicy) else None) or PolicyTimings()

    def attach_timing(self) -> None:
        """Measure layers and asynchronous policy events from now on, for benchmarks."""
        policy = self._engine.cache_manager.policy
        with self._engine.lock:
            self._engine.layer_timing = LayerTiming(policy.layers)
            if isinstance(policy, AsyncPolicy):
                policy.timings = PolicyTimings()

    def attach_link_accounting(self) -> None:
        """Starts to account time and bytes of reads into the pool, for benchmarks; does nothing on devices."""
        if isinstance(self._engine.transfer, ReaderThreads):
            self._engine.transfer.attach_accounting()

    @property
    def link_totals(self) -> LinkTotals:
        """Link time and bytes since loading, or since `reset_stats`; all 0 without `attach_link_accounting`."""
        return self._link_totals() - self._link_totals_at_reset

    def _link_totals(self) -> LinkTotals:
        transfer = self._engine.transfer
        return transfer.link_totals() if isinstance(transfer, ReaderThreads) else LinkTotals()

    def force_gates(self, gates: ForcedGates, name: str) -> None:
        """Shows the policy these gate distributions instead of the model's own, as its routing is forced.

        Args:
            gates: of the forced routing.
            name: the trace, for statistics and messages.

        Raises:
            ConfigError: the policy needs lookahead, which the trace lacks, or its maps would be saved as this model's.
        """
        if "lookahead" in self._engine.cache_manager.policy.needs and not gates.lookahead:
            raise ConfigError(f"--replay-routing: {name} has no lookahead, which --policy {self.policy} needs")
        if self._map_persistence is not None:
            raise ConfigError(f"--map-store: maps of replayed routing are not this model's; give none ({name})")
        self.replayed_routing = name
        if self.observer is not None:
            self.observer.force_gates(gates)

    @property
    def device(self) -> str:
        """Where the pool is: `cpu`, or devices separated by commas."""
        return "cpu" if self._tiers is None else ",".join(str(d.torch_device) for d in self._tiers.devices)

    @property
    def host_resident(self) -> int:
        """Experts in the host tier; 0 without one."""
        transfer: Any = self._engine.transfer
        resident: int = 0 if self._tiers is None else transfer.host.resident
        return resident

    @property
    def host_slots(self) -> int:
        """Capacity of the host tier in experts; 0 without one."""
        return 0 if self._tiers is None else self._tiers.host_slots

    def _disk_bytes(self) -> int:
        transfer: Any = self._engine.transfer
        read: int = transfer.moved_bytes if self._tiers is None else transfer.disk_bytes
        return read

    def _kernel(self) -> str:
        kinds = Counter("forward" if each.accumulator is None else each.kernel for each in self._layers)
        return kinds.most_common(1)[0][0] if kinds else "ggml"

    def explain(self) -> tuple[ExplainRow, ...]:
        """Predictions, hits, late arrivals, misses and wasted prefetches, by layer and by what loaded the expert.

        Raises:
            ConfigError: the model was loaded without `explain`.
        """
        source_counts = self._engine.cache_manager.source_counts
        if source_counts is None:
            raise ConfigError("explain: is off; load the model with explain=True, or --explain")
        return source_counts.rows()

    def watch(self) -> None:
        """Starts counting accesses per expert, for `experts()`."""
        with self._engine.lock:
            self._engine.cache_manager.enable_expert_counts()

    def experts(self) -> PerExpert:
        """State and access counts of every expert, a consistent snapshot. Safe to call from any thread.

        Raises:
            ConfigError: `watch()` was not called.
        """
        cache_manager = self._engine.cache_manager
        with self._engine.lock:
            if cache_manager.expert_counts is None:
                raise ConfigError("experts: are not counted; call watch() first")
            status, pinned = cache_manager.cache.status.copy(), cache_manager.cache.pinned.copy()
            counts = cache_manager.expert_counts.counts.copy()
        shape = len(self.expert_index.layouts), -1
        return PerExpert(
            experts=tuple(layout.experts for layout in self.expert_index.layouts),
            state=(status + (pinned & (status == cache.RESIDENT))).reshape(shape),
            pinned=pinned.reshape(shape),
            hits=counts[accounting.HITS].reshape(shape),
            late=counts[accounting.LATE].reshape(shape),
            misses=counts[accounting.MISSES].reshape(shape),
            prefetched=counts[accounting.PREFETCHED].reshape(shape),
            wasted=counts[accounting.WASTED].reshape(shape),
        )

    def reset_stats(self) -> None:
        """Sets all counters to 0; resident experts stay."""
        with self._engine.lock:
            if self._tiers is not None:
                self._tiers.collect_counters()
            self._engine.counters.reset()
            if self._engine.layer_timing is not None:
                self._engine.layer_timing.reset()
            self._link_totals_at_reset = self._link_totals()
            self._engine.cache_manager.cache.counters[:] = 0
            policy = self._engine.cache_manager.policy
            if isinstance(policy, AsyncPolicy):
                policy.searches = policy.dropped = 0
                policy.timings = None if policy.timings is None else PolicyTimings()
            if self._engine.cache_manager.source_counts is not None:
                self._engine.cache_manager.source_counts.counts[:] = 0
            if self._engine.cache_manager.expert_counts is not None:
                self._engine.cache_manager.expert_counts.counts[:] = 0
            self._moved_bytes_at_reset = self._engine.transfer.moved_bytes
            self._disk_bytes_at_reset = self._disk_bytes()

    def learn(self, requests: Iterable[Recorded]) -> None:
        """Trains the policy on recorded requests; blocks until it has processed them."""
        policy = self._engine.cache_manager.policy
        for recorded in requests:
            policy.learn(recorded)
        if isinstance(policy, AsyncPolicy):
            policy.flush()

    @property
    def num_updates(self) -> int:
        """Iterations that the policy has learned from, in total; `learned()` is unchanged while this is."""
        return self._engine.cache_manager.policy.num_updates

    def check_maps(self, maps: Maps) -> None:
        """Raises `MapsError` if `maps` belong to another model or policy, or are damaged."""
        policy = self._engine.cache_manager.policy
        kind = self.policy.partition("/")[0]
        if (maps.model, maps.policy) != (self.fingerprint, kind):
            raise MapsError(f"maps of {maps.name} ({maps.model}) under --policy {maps.policy} are not this model's")
        wrong = check_arrays(maps.arrays, policy.layers, policy.experts)
        if wrong is not None:
            raise DamagedMapsError(f"maps of {maps.name} are damaged ({wrong})")

    def learned(self) -> Maps | None:
        """The maps that the policy has learned; `None` if there are none. Safe to call from any thread."""
        policy = self._engine.cache_manager.policy
        arrays = policy.state_dict() if self.fingerprint is not None else {}
        if not arrays or self.fingerprint is None:
            return None
        kind = self.policy.partition("/")[0]  # maps do not depend on the policy's settings
        return Maps(kind, self.fingerprint, self.checkpoint.name, policy.layers, policy.experts, arrays)

    def end_requests(self) -> None:
        """Lets the policy learn from requests that have ended. Call from the model's thread, while no request runs."""
        with self._engine.lock:
            self._engine.cache_manager.policy.begin(())

    def load_maps(self, maps: Maps, num_updates: int) -> bool:
        """Replaces the policy's maps. Call from the model's thread, while no request runs.

        Args:
            maps: accepted by `check_maps`.
            num_updates: of the policy when `maps` were derived from its own.

        Returns:
            Whether they were replaced: not if the policy has learned more since, which would be lost.
        """
        policy = self._engine.cache_manager.policy
        if isinstance(policy, AsyncPolicy):
            policy.flush()
        with self._engine.lock:
            if policy.num_updates != num_updates:
                return False
            policy.load_state_dict(maps.arrays)
        return True

    @property
    def lock(self) -> threading.RLock:
        """Held during a forward pass, and to empty or close the pool."""
        return self._lock

    def evict_all(self) -> None:
        """Empties the pool, as after loading. For measurements of a cold start."""
        with self._lock:
            self._engine.clear()

    def check_integrity(self) -> None:
        """Raises `InvariantError` if the pool's bookkeeping is inconsistent."""
        self._engine.check_integrity()

    def close(self) -> None:
        """Saves the learned maps, then frees the pool, the reader threads and the open files, once no pass runs.

        The model can't run any more. Open models are closed when the interpreter exits.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with ExitStack() as stack:  # runs in reverse order, each even if a Ctrl-C interrupts the one before it
                stack.callback(self._save_maps)
                if self._resources is not None:
                    stack.callback(self._resources.close)
                    return
                stack.callback(self._store.close)
                stack.callback(self._engine.pool.close)
                for layer in self._layers:
                    stack.callback(layer.close)
                stack.callback(self._engine.transfer.close)
                if self._tiers is not None:
                    stack.callback(self._tiers.close)

    def _save_maps(self) -> None:
        policy = self._engine.cache_manager.policy
        finished = policy.finish() if isinstance(policy, AsyncPolicy) else policy
        if self._map_persistence is not None and finished is not None:
            self._map_persistence.save(finished)


class OffloadedModel:
    """Mixed into the class of a loaded model: adds `finemoe` and `close`, serialises passes, refuses to be saved."""

    finemoe: ModelHandle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a forward pass without gradients (offloaded experts have none). Threads run one pass at a time."""
        import torch

        with self.finemoe.lock, torch.no_grad():  # the observer's hooks hold the state of one pass
            return super().__call__(*args, **kwargs)  # type: ignore[misc] # the transformers model's

    def close(self) -> None:
        """Frees the expert pool, the reader threads and the open files. The model can't run any more."""
        self.finemoe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Always raises `FinemoeError`: the experts are not in this model."""
        raise FinemoeError(
            f"an offloaded model can't be saved, its experts are in {self.finemoe.checkpoint.folder}; "
            "load it with transformers to save a copy"
        )

    def push_to_hub(self, *_: Any, **__: Any) -> None:
        """Always raises `FinemoeError`: the experts are not in this model."""
        self.save_pretrained()
