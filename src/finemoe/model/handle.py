"""The running side of an offloaded model: its statistics, and how it is closed."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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
from finemoe.policy import accounting as expert_counts
from finemoe.policy import cache_state as cache
from finemoe.policy.cache_state import Scores
from finemoe.store import DiskStore
from finemoe.store.bandwidth import LinkTotals
from finemoe.store.reader import ReaderThreads
from finemoe.system import peak_rss_bytes
from finemoe.types import Recorded

if TYPE_CHECKING:  # these import torch and transformers, which a GGUF model needs nothing of
    from finemoe.engine.expert_layer import ExpertLayer
    from finemoe.gpu.setup import Tiers
    from finemoe.model.observer import ForcedGates, Observer


class ModelHandle:
    """The running side of an offloaded model: `model.finemoe`."""

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
        keeper: MapPersistence | None = None,
        observer: Observer | None = None,
        tiers: Tiers | None = None,
        fingerprint: str | None = None,
        resources: ExitStack | None = None,
    ) -> None:
        self.observer = observer  # None where the policy listens to nothing
        self.checkpoint = checkpoint
        self.expert_index = expert_index
        self.policy = config.policy
        self.fingerprint = fingerprint  # of the model; None where the policy learns nothing
        self.lossy = config.lossy
        self.link_bandwidth_bytes_s = config.link_bandwidth_bytes_s
        self._store = store
        self._engine = engine
        self._layers = layers
        self._lock = lock
        self._keeper = keeper
        self.replayed_routing: str | None = None  # the trace that stands in for the routers
        self._tiers = tiers
        self._resources = resources  # of another backend; they own store, pool and transfer
        self._closed = False
        self._read_before = 0
        self._link_before = self._link_totals()
        self._disk_before = 0

    def stats(self) -> Stats:
        """What happened since loading, or since `reset_stats`."""
        with self._engine.lock:
            return self._stats()

    def _stats(self) -> Stats:
        if self._tiers is not None:
            self._tiers.settle()
        policy = self._engine.cache_manager.policy
        counters, pool, tally = self._engine.counters, self._engine.pool, self._engine.cache_manager.cache.counters
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
            prefetched=int(tally[cache.PREFETCHED]),
            prefetched_used=int(tally[cache.PREFETCHED_USED]),
            wasted=int(tally[cache.WASTED]),
            regretted=int(tally[cache.REGRETTED]),
            paused=int(tally[cache.THROTTLED]),
            searches=policy.searches if isinstance(policy, AsyncPolicy) else 0,
            searches_late=policy.late if isinstance(policy, AsyncPolicy) else 0,
            bytes_read=self._engine.transfer.moved_bytes - self._read_before,
            stall_s=counters.stall_s,
            stalled_bytes=counters.stalled_bytes,
            peak_rss_bytes=peak_rss_bytes() - pool.mapped_twice_bytes,
            explained=None if source_counts is None else source_counts.rows(),
            replayed_routing=self.replayed_routing,
            device=self.device,
            expert_kernel=self._kernel(),
            host_memory_bytes=0 if self._tiers is None else self._tiers.host_memory_bytes,
            disk_bytes=self._disk_bytes() - self._disk_before,
            host_computed=counters.computed_on_host,
        )

    @property
    def layer_timing(self) -> LayerTiming:
        """Where the model's time went since loading, or since `reset_stats`."""
        return self._engine.layer_timing

    @property
    def policy_timings(self) -> PolicyTimings:
        """How long a policy beside the model thought, since then."""
        policy = self._engine.cache_manager.policy
        return policy.policy_timings if isinstance(policy, AsyncPolicy) else PolicyTimings()

    def attach_link_accounting(self) -> None:
        """Account the time and bytes of the link into the pool from now on, for benchmarks; not on devices."""
        if isinstance(self._engine.transfer, ReaderThreads):
            self._engine.transfer.attach_accounting()

    @property
    def link_totals(self) -> LinkTotals:
        """Link time and bytes since loading, or since `reset_stats`; all 0 without `attach_link_accounting`."""
        return self._link_totals() - self._link_before

    def _link_totals(self) -> LinkTotals:
        transfer = self._engine.transfer
        return transfer.link_totals() if isinstance(transfer, ReaderThreads) else LinkTotals()

    def force_gates(self, evidence: ForcedGates, name: str) -> None:
        """The model's routing is forced: policies hear `evidence`, and statistics name the trace that it comes from.

        Raises:
            ConfigError: the policy needs what the trace lacks, or would keep what it learns as if it were this model's.
        """
        if "lookahead" in self._engine.cache_manager.policy.needs and not evidence.lookahead:
            raise ConfigError(f"--replay-routing: {name} has no lookahead, which --policy {self.policy} needs")
        if self._keeper is not None:
            raise ConfigError(f"--map-store: maps of replayed routing are not this model's; give none ({name})")
        self.replayed_routing = name
        if self.observer is not None:
            self.observer.force_gates(evidence)

    @property
    def device(self) -> str:
        """Where the pool is; several devices are separated by commas."""
        return "cpu" if self._tiers is None else ",".join(str(d.torch_device) for d in self._tiers.devices)

    @property
    def host_resident(self) -> int:
        """Experts in the host tier; 0 where there is none."""
        transfer: Any = self._engine.transfer
        resident: int = 0 if self._tiers is None else transfer.host.resident
        return resident

    @property
    def host_slots(self) -> int:
        """Experts that the host tier has room for; 0 where there is none."""
        return 0 if self._tiers is None else self._tiers.host_slots

    def _disk_bytes(self) -> int:
        transfer: Any = self._engine.transfer
        read: int = transfer.moved_bytes if self._tiers is None else transfer.disk_bytes
        return read

    def _kernel(self) -> str:
        kinds = Counter("forward" if each.accumulator is None else each.kernel for each in self._layers)
        return kinds.most_common(1)[0][0] if kinds else "ggml"

    def explain(self) -> tuple[ExplainRow, ...]:
        """What was predicted, hit, late, missed and wasted, by layer and by what had brought the experts in.

        Raises:
            ConfigError: it was not asked for when the model was loaded.
        """
        source_counts = self._engine.cache_manager.source_counts
        if source_counts is None:
            raise ConfigError("explain: was not asked for; load the model with explain=True, or --explain")
        return source_counts.rows()

    def watch(self) -> None:
        """From now on, count every expert on its own, for `experts()`."""
        with self._engine.lock:
            self._engine.cache_manager.enable_expert_counts()

    def experts(self) -> PerExpert:
        """Where every expert is now, and what its accesses found; all of one moment. Safe to call from any thread.

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
            hits=counts[expert_counts.HITS].reshape(shape),
            late=counts[expert_counts.LATE].reshape(shape),
            misses=counts[expert_counts.MISSES].reshape(shape),
            prefetched=counts[expert_counts.PREFETCHED].reshape(shape),
            wasted=counts[expert_counts.WASTED].reshape(shape),
        )

    def reset_stats(self) -> None:
        """Start counting anew; what is resident stays."""
        with self._engine.lock:
            if self._tiers is not None:
                self._tiers.settle()
            self._engine.counters.reset()
            self._engine.layer_timing.reset()
            self._link_before = self._link_totals()
            self._engine.cache_manager.cache.counters[:] = 0
            policy = self._engine.cache_manager.policy
            if isinstance(policy, AsyncPolicy):
                policy.searches = policy.late = 0
                policy.policy_timings = PolicyTimings()
            if self._engine.cache_manager.source_counts is not None:
                self._engine.cache_manager.source_counts.counts[:] = 0
            if self._engine.cache_manager.expert_counts is not None:
                self._engine.cache_manager.expert_counts.counts[:] = 0
            self._read_before = self._engine.transfer.moved_bytes
            self._disk_before = self._disk_bytes()

    def predict_request(self, token_ids: Sequence[int], reply: Callable[[Scores | None], object]) -> None:
        """Says what a request will use, by its prompt: `[L, E]`, the share of its tokens for each expert, or `None`.

        `reply` hears it, it may be later, from the policy's thread; not at all if the model is closed before.
        """
        policy = self._engine.cache_manager.policy
        if self.observer is None:
            reply(None)
        elif isinstance(policy, AsyncPolicy):
            policy.ask_ahead(self.observer.opening(token_ids), reply)
        else:
            reply(policy.predict_request(self.observer.opening(token_ids)))

    def learn(self, requests: Iterable[Recorded]) -> None:
        """The policy takes in requests that were recorded earlier; returns when it has thought them through."""
        policy = self._engine.cache_manager.policy
        for recorded in requests:
            policy.learn(recorded)
        if isinstance(policy, AsyncPolicy):
            policy.settle()

    @property
    def num_updates(self) -> int:
        """How many iterations the policy ever took in; what it knows has changed where this has."""
        return self._engine.cache_manager.policy.num_updates

    def refuse_others(self, maps: Maps) -> None:
        """Raises `MapsError` if these are not of this model and policy, or are damaged."""
        policy = self._engine.cache_manager.policy
        kind = self.policy.partition("/")[0]
        if (maps.model, maps.policy) != (self.fingerprint, kind):
            raise MapsError(f"maps of {maps.name} ({maps.model}) under --policy {maps.policy} are not this model's")
        wrong = check_arrays(maps.arrays, policy.layers, policy.experts)
        if wrong is not None:
            raise DamagedMapsError(f"maps of {maps.name} are damaged ({wrong})")

    def learned(self) -> Maps | None:
        """What the policy knows by now; `None` if that is nothing. Safe to call from any thread."""
        policy = self._engine.cache_manager.policy
        arrays = policy.state_dict() if self.fingerprint is not None else {}
        if not arrays or self.fingerprint is None:
            return None
        kind = self.policy.partition("/")[0]  # settings do not change what maps are
        return Maps(kind, self.fingerprint, self.checkpoint.name, policy.layers, policy.experts, arrays)

    def end_requests(self) -> None:
        """No request runs: what the policy keeps until then enters what it knows. From the model's thread."""
        with self._engine.lock:
            self._engine.cache_manager.policy.begin(())

    def take_in(self, maps: Maps, num_updates: int) -> bool:
        """The policy goes on from these, in place of what it learned; from the model's thread, while no request runs.

        Args:
            maps: that `refuse_others` lets pass.
            experience: of the policy when `maps` were made from what it knew.

        Returns:
            Whether it does: not if it has learned more since, which would be lost.
        """
        policy = self._engine.cache_manager.policy
        if isinstance(policy, AsyncPolicy):
            policy.settle()
        with self._engine.lock:
            if policy.num_updates != num_updates:
                return False
            policy.load_state_dict(maps.arrays)
        return True

    @property
    def lock(self) -> threading.RLock:
        """Held by the pass that runs, by its layers, and by whoever empties the pool or closes it."""
        return self._lock

    def evict_all(self) -> None:
        """Empty the pool, as after loading. For measurements of a cold start."""
        with self._lock:
            self._engine.clear()

    def check_integrity(self) -> None:
        """Raises `InvariantError` if the pool's bookkeeping contradicts itself."""
        self._engine.check_integrity()

    def close(self) -> None:
        """Free the pool, the reader threads and the open files, once no pass runs; keep what the policy learned.

        The model can't run any more. The interpreter's exit closes what is still open.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            with ExitStack() as rest:  # from its end on; a Ctrl-C that breaks one off does not keep back the others
                rest.callback(self._keep)
                if self._resources is not None:
                    rest.callback(self._resources.close)
                    return
                rest.callback(self._store.close)
                rest.callback(self._engine.pool.close)
                for layer in self._layers:
                    rest.callback(layer.close)
                rest.callback(self._engine.transfer.close)
                if self._tiers is not None:
                    rest.callback(self._tiers.close)

    def _keep(self) -> None:
        policy = self._engine.cache_manager.policy
        learned = policy.finish() if isinstance(policy, AsyncPolicy) else policy
        if self._keeper is not None and learned is not None:
            self._keeper.save(learned)


class OffloadedModel:
    """Mixed into the class of a loaded model: what is different about it."""

    finemoe: ModelHandle

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model, without gradients: offloaded experts have none. Threads take turns, a pass at a time."""
        import torch

        with self.finemoe.lock, torch.no_grad():  # what listens to a pass keeps its state until that ends
            return super().__call__(*args, **kwargs)  # type: ignore[misc] # the transformers model's

    def close(self) -> None:
        """Free the expert pool, the reader threads and the open files. The model can't run any more."""
        self.finemoe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        """Refused: the experts are not in this model."""
        raise FinemoeError(
            f"an offloaded model can't be saved, its experts are in {self.finemoe.checkpoint.folder}; "
            "load it with transformers to save a copy"
        )

    def push_to_hub(self, *_: Any, **__: Any) -> None:
        """Refused: the experts are not in this model."""
        self.save_pretrained()
