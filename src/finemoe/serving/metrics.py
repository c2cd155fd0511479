"""Prometheus metrics of `/metrics`: counters of the server, and statistics of the worker and the expert pool."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from finemoe.serving.model_info import ServedModel
from finemoe.serving.request import RequestTimings

_TTFT_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
_TPOT_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """The metrics of one server, in a registry of its own.

    Args:
        served: its worker and expert pool are read at each scrape.
    """

    def __init__(self, served: ServedModel) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "finemoe_requests", "Requests to generate, by outcome.", ["outcome"], registry=self.registry
        )
        self._prompt_tokens = Counter("finemoe_prompt_tokens", "Tokens of prompts.", registry=self.registry)
        self._generated_tokens = Counter("finemoe_generated_tokens", "Tokens of answers.", registry=self.registry)
        self._ttft = Histogram(
            "finemoe_time_to_first_token_seconds",
            "From a request to the first token of each answer.",
            buckets=_TTFT_BUCKETS_S,
            registry=self.registry,
        )
        self._tpot = Histogram(
            "finemoe_time_per_output_token_seconds",
            "Mean time per token after the first, of each answer.",
            buckets=_TPOT_BUCKETS_S,
            registry=self.registry,
        )
        self._duration = Histogram(
            "finemoe_request_duration_seconds",
            "From a request to the end of its response.",
            buckets=_TTFT_BUCKETS_S,
            registry=self.registry,
        )
        for outcome in ("finished", "cancelled", "timeout", "error", "refused", "invalid"):
            self._requests.labels(outcome)
        self.registry.register(_EngineCollector(served))

    def refused(self, status: int) -> None:
        """Counts a generation request that was rejected before it ran, by its HTTP status."""
        self._requests.labels("refused" if status in {429, 503} else "invalid").inc()

    def ended(self, timings: RequestTimings) -> None:
        """Records a request that ran and has ended."""
        self._requests.labels(timings.outcome).inc()
        self._prompt_tokens.inc(timings.prompt_tokens)
        self._generated_tokens.inc(timings.completion_tokens)
        self._duration.observe(timings.total_s)
        for ttft_s in timings.ttft_s:
            self._ttft.observe(ttft_s)
        for tpot_s in timings.tpot_s:
            self._tpot.observe(tpot_s)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The metrics as text, and its content type: OpenMetrics or Prometheus, by the `Accept` header."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


class _EngineCollector(Collector):
    """Reads the worker's load and the expert pool's statistics at each scrape."""

    def __init__(self, served: ServedModel) -> None:
        self._served = served

    def describe(self) -> list[Metric]:
        """Empty, so that registering reads no statistics."""
        return []

    def collect(self) -> Iterator[Metric]:
        load, stats = self._served.worker.load(), self._served.stats()
        gauges = {
            "finemoe_answers_running": ("Answers that run.", load.running),
            "finemoe_answers_waiting": ("Answers that wait to run.", load.waiting),
            "finemoe_cache_blocks": ("Blocks of the key-value cache.", load.cache_blocks),
            "finemoe_cache_blocks_free": ("Blocks of the key-value cache that are free.", load.free_cache_blocks),
            "finemoe_experts": ("Routed experts of the model.", stats.experts),
            "finemoe_experts_resident": ("Routed experts in memory.", stats.resident),
            "finemoe_expert_memory_bytes": ("Memory of the expert pool.", stats.expert_memory_bytes),
            "finemoe_peak_rss_bytes": ("Most memory that the process held.", stats.peak_rss_bytes),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value)
        accesses = CounterMetricFamily(
            "finemoe_expert_accesses", "Experts that layers needed: resident, in flight, or neither.", labels=["result"]
        )
        for result, count in (("hit", stats.hits), ("late", stats.late), ("miss", stats.misses)):
            accesses.add_metric([result], count)
        yield accesses
        counters: dict[str, tuple[str, float]] = {
            "finemoe_expert_read_bytes": ("Bytes of experts read.", stats.bytes_read),
            "finemoe_expert_stall_seconds": ("Time that layers waited for experts.", stats.stall_s),
            "finemoe_expert_evictions": ("Experts that made room.", stats.evictions),
            "finemoe_expert_prefetches": ("Reads of experts begun before they were needed.", stats.prefetched),
            "finemoe_expert_prefetches_used": ("Of these, needed later.", stats.prefetched_used),
            "finemoe_expert_prefetches_wasted": ("Of these, dropped unneeded.", stats.wasted),
        }
        for name, (text, total) in counters.items():
            yield CounterMetricFamily(name, text, total)
