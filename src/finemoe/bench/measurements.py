"""Data of a row: the variant measured, the task of its worker process, and the process's result. JSON-serialisable."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from finemoe.bench.config import DISK_OFFLOAD, BenchConfig
from finemoe.config import STORED
from finemoe.engine.async_policy import POLICY_TIMINGS
from finemoe.engine.layer_timing import TOTALS
from finemoe.metrics import NEVER, Durations, ExplainRow
from finemoe.store.bandwidth import LINK_TOTALS

Kind = Literal["finemoe", "resident", "disk-offload"]
_COUNTED = ("accesses", "hits", "late", "bytes_read", "stall_s", "stalled_bytes")
COUNTED = (*_COUNTED, *TOTALS, *POLICY_TIMINGS, *LINK_TOTALS)  # the engine's counters, by phase
_TIMED = (*TOTALS, *POLICY_TIMINGS, "passages")  # of these, those of type `Durations`


@dataclass(frozen=True)
class Variant:
    """One way to run the model: a row. `budget` and `policy` are finemoe's, `implementation` is transformers'."""

    kind: Kind
    budget: str = ""
    policy: str = ""
    implementation: str = ""
    expert_dtype: str = STORED

    @property
    def lossy(self) -> bool:
        """Whether experts are quantized, so that answers differ from the checkpoint's."""
        return self.expert_dtype != STORED

    @property
    def name(self) -> str:
        if self.kind == "finemoe":
            return f"finemoe {self.policy} {self.budget}" + (f" {self.expert_dtype}" if self.lossy else "")
        if self.kind == "resident":
            return f"transformers {self.implementation}"
        return "transformers disk offload"


def variants(config: BenchConfig) -> tuple[Variant, ...]:
    """The rows of a benchmark, in the order in which they are measured."""
    rows = [
        Variant("finemoe", budget=budget, policy=policy, expert_dtype=dtype)
        for policy, dtype, budget in product(config.policies, config.expert_dtypes, config.budgets)
    ]
    rows += [Variant("resident", implementation=n) for n in config.baseline_names if n != DISK_OFFLOAD]
    if DISK_OFFLOAD in config.baseline_names:
        rows.append(Variant("disk-offload", implementation="eager"))
    return tuple(rows)


@dataclass(frozen=True)
class WorkerTask:
    """Input of the worker process of one row."""

    variant: Variant
    load: dict[str, Any]  # fields of a LoadConfig
    prompt: tuple[int, ...]
    context: tuple[int, ...]
    new_tokens: int
    threads: int
    expert_bytes: int = 1 << 20  # finemoe: contiguous bytes per read of the disk probe
    memory_bytes: int = 0  # disk-offload: limit for weights
    offload_folder: str = ""
    requests: tuple[tuple[int, ...], ...] = ()  # of real prompts, instead of `prompt` and `context`
    warm: tuple[tuple[int, ...], ...] = ()  # requests to answer first, unmeasured
    store: str = ""  # a trace to learn from before `warm`
    replay_routing: str | None = None  # the trace whose routing is forced onto the model
    text: tuple[int, ...] = ()  # to measure perplexity on, last

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> WorkerTask:
        given: dict[str, Any] = {name: tuple(raw.pop(name)) for name in ("prompt", "context", "text")}
        given |= {name: tuple(tuple(ids) for ids in raw.pop(name)) for name in ("requests", "warm")}
        return cls(variant=Variant(**raw.pop("variant")), **given, **raw)


@dataclass(frozen=True)
class Phase:
    """One phase: the prompt (prefill), or the tokens after it (decoding). Counters are 0 for transformers' rows."""

    seconds: tuple[float, ...]  # of each step
    disk_bytes: int | None  # read from storage by the process; None where the kernel does not count it
    accesses: int = 0
    hits: int = 0
    late: int = 0
    bytes_read: int = 0
    stall_s: float = 0.0
    stalled_bytes: int = 0
    befores: Durations = NEVER  # these three: see `LayerTiming`
    afters: Durations = NEVER
    arounds: Durations = NEVER
    begins: Durations = NEVER  # these two: see `PolicyTimings`
    gates: Durations = NEVER
    urgent_s: float = 0.0  # these four: see `LinkTotals`
    urgent_bytes: float = 0.0
    prefetch_s: float = 0.0
    prefetch_bytes: float = 0.0
    passages: Durations = NEVER  # of undisturbed prefetches, see `LinkTotals`
    link_bytes_s: float | None = None  # raw bandwidth, measured between the steps; None if it was not

    @property
    def total_s(self) -> float:
        return sum(self.seconds)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Phase:
        timed: dict[str, Any] = {name: Durations(**raw.pop(name)) for name in _TIMED}
        return cls(seconds=tuple(raw.pop("seconds")), **timed, **raw)


@dataclass(frozen=True)
class RandomTokensResult:
    """Result of a row on random tokens: a cold prompt, then the continuation of another."""

    load_s: float  # imports excluded
    prompt: Phase  # one step: the first token after a cold start
    decode: Phase
    tokens: tuple[int, ...]
    logits: tuple[str, ...]  # hash of each token's logits, bit for bit
    dense_bytes: int  # weights in memory outside the pool
    pool_bytes: int
    peak_rss_bytes: int
    torch_threads: int
    explained: tuple[ExplainRow, ...] | None = None  # of decoding, with --explain
    perplexity: float | None = None

    @property
    def weight_bytes(self) -> int:
        """Dense weights and pool."""
        return self.dense_bytes + self.pool_bytes

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> RandomTokensResult:
        prompt, decode = Phase.from_dict(raw.pop("prompt")), Phase.from_dict(raw.pop("decode"))
        tokens, logits = tuple(raw.pop("tokens")), tuple(raw.pop("logits"))
        explained = explain_rows(raw.pop("explained"))
        return cls(prompt=prompt, decode=decode, tokens=tokens, logits=logits, explained=explained, **raw)


def counted(handle: Any) -> dict[str, Any]:
    """The counters of `model.finemoe`, by the names of `COUNTED`."""
    kept = (
        (handle.stats(), _COUNTED), (handle.layer_timing, TOTALS), (handle.policy_timings, POLICY_TIMINGS),
        (handle.link_totals, LINK_TOTALS),
    )  # fmt: skip
    return {name: getattr(each, name) for each, names in kept for name in names}


def explain_rows(raw: list[dict[str, Any]] | None) -> tuple[ExplainRow, ...] | None:
    """The rows of `--explain`, from JSON."""
    return None if raw is None else tuple(ExplainRow.from_dict(row) for row in raw)


@dataclass(frozen=True)
class RequestResult:
    """Result of one request, greedy. `decode` has a step for each token after the first."""

    prompt_tokens: int
    prompt: Phase  # one step: the first token
    decode: Phase
    tokens: tuple[int, ...]
    logits: str  # hash of all tokens' logits, bit for bit

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> RequestResult:
        prompt, decode = Phase.from_dict(raw.pop("prompt")), Phase.from_dict(raw.pop("decode"))
        return cls(prompt=prompt, decode=decode, tokens=tuple(raw.pop("tokens")), **raw)


@dataclass(frozen=True)
class PromptsResult:
    """Result of a row on real prompts, in order; the policy keeps learning from one request to the next."""

    load_s: float  # imports excluded
    answers: tuple[RequestResult, ...]
    prefetched: int
    prefetched_used: int
    wasted: int
    dense_bytes: int  # weights in memory outside the pool
    pool_bytes: int
    peak_rss_bytes: int
    torch_threads: int
    explained: tuple[ExplainRow, ...] | None = None  # with --explain
    perplexity: float | None = None
    expert_bytes: float = 0.0  # stored bytes of one expert; 0 for transformers' rows

    @property
    def tokens(self) -> tuple[tuple[int, ...], ...]:
        return tuple(answer.tokens for answer in self.answers)

    @property
    def logits(self) -> tuple[str, ...]:
        return tuple(answer.logits for answer in self.answers)

    @property
    def tokens_digest(self) -> str:
        """Hash of all output token ids, which must be equal for all policies and budgets."""
        return hashlib.sha256(repr(self.tokens).encode()).hexdigest()[:16]

    @property
    def weight_bytes(self) -> int:
        """Dense weights and pool."""
        return self.dense_bytes + self.pool_bytes

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> PromptsResult:
        answers = tuple(RequestResult.from_dict(answer) for answer in raw.pop("answers"))
        explained = explain_rows(raw.pop("explained"))
        return cls(answers=answers, explained=explained, **raw)


MACHINE_SETTINGS: tuple[str, ...] = (  # fields of a machine file for `finemoe simulate --machine`
    "link_ratio", "before_gate", "gap", "lag", "begin_lag", "prefetch_slowdown",
    "compute_spread", "link_spread", "lag_spread", "tokens_per_unit",
)  # fmt: skip
MACHINE_FIGURES = ("layer_s", "expert_s", "outside_s", *MACHINE_SETTINGS)


def machine_figures(
    prompts: Sequence[tuple[int, Phase]], decode: Phase, expert_bytes: float
) -> dict[str, float | None]:
    """The simulator's machine settings as measured; `None` for transformers' rows, a single MoE layer or no answer.

    - `layer_s`: one layer's compute for one token while decoding, without waiting for experts; readers and policy
      threads slow it down; `before_gate`: the share of it before the gate;
    - `expert_s`: busy time of the link per demand load, while decoding;
    - `outside_s`: from the last MoE layer of a token to the first of the next: head, sampling, embedding;
    - `link_ratio`, `gap`: `expert_s` and `outside_s` in units of `layer_s`;
    - `lag`, `begin_lag`: in the same units, the mean time from a gate, and from the begin of an iteration, until an
      asynchronous policy's scores take effect, without waiting for the event before;
    - `lag_spread`: standard deviation of the logarithm of that from a gate;
    - `prefetch_slowdown`: time to prefetch an expert / `expert_s`;
    - `compute_spread`: standard deviation of the logarithm of the time from a layer's end to the next gate;
    - `link_spread`: the same of the time to transfer an expert, over prefetches that no demand load disturbed;
    - `tokens_per_unit`: tokens of a prompt that a layer computes in the time of one; over all prompts together.

    Args:
        prompts: number of tokens and prefill phase of each prompt.
        decode: the decode phases of all requests, merged.
        expert_bytes: bytes of one expert.
    """
    found: dict[str, float | None] = dict.fromkeys(MACHINE_FIGURES)
    before_s, layer_s = decode.befores.mean_s, _layer_s(decode)
    if before_s is None or layer_s is None:
        return found
    found |= {
        "layer_s": layer_s,
        "before_gate": before_s / layer_s,
        "compute_spread": decode.befores.spread,
        "link_spread": decode.passages.spread,
        "lag_spread": decode.gates.spread,
    }
    if (around_s := decode.arounds.mean_s) is not None:  # includes the first layer's compute before its gate
        outside_s = max(0.0, around_s - before_s)
        found |= {"outside_s": outside_s, "gap": outside_s / layer_s}
    found |= _link(decode, expert_bytes, layer_s)
    for name, policy_timings in (("lag", decode.gates), ("begin_lag", decode.begins)):
        if policy_timings.mean_s is not None:
            found[name] = policy_timings.mean_s / layer_s
    timed = [(tokens, own_s) for tokens, prefill in prompts if (own_s := _layer_s(prefill))]
    if prompts_s := sum(own_s for _, own_s in timed):
        found["tokens_per_unit"] = max(1, round(layer_s * sum(tokens for tokens, _ in timed) / prompts_s))
    return found


def _link(decode: Phase, expert_bytes: float, layer_s: float) -> dict[str, float | None]:
    """Link figures; without demand loads, prefetches give the transfer time."""
    times = [
        seconds * expert_bytes / moved
        for seconds, moved in ((decode.urgent_s, decode.urgent_bytes), (decode.prefetch_s, decode.prefetch_bytes))
        if moved
    ]
    if not times:
        return {}
    return {
        "expert_s": times[0],
        "link_ratio": times[0] / layer_s,
        "prefetch_slowdown": times[1] / times[0] if len(times) > 1 else None,
    }


def _layer_s(phase: Phase) -> float | None:
    """Compute of one layer, the mean over layers and forward passes."""
    before_s, after_s = phase.befores.mean_s, phase.afters.mean_s
    return None if before_s is None or after_s is None else before_s + after_s
