"""What stands in a row: a subject, the order that its process gets, and what it hands back. Plain data, for JSON."""

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
COUNTED = (*_COUNTED, *TOTALS, *POLICY_TIMINGS, *LINK_TOTALS)  # of the engine's, for each phase
_TIMED = (*TOTALS, *POLICY_TIMINGS, "passages")  # of these, Durations


@dataclass(frozen=True)
class Subject:
    """One way to run the model. `budget` and `policy` are finemoe's, `implementation` is transformers'."""

    kind: Kind
    budget: str = ""
    policy: str = ""
    implementation: str = ""
    expert_dtype: str = STORED

    @property
    def lossy(self) -> bool:
        """Whether its answers are not the checkpoint's own."""
        return self.expert_dtype != STORED

    @property
    def name(self) -> str:
        if self.kind == "finemoe":
            return f"finemoe {self.policy} {self.budget}" + (f" {self.expert_dtype}" if self.lossy else "")
        if self.kind == "resident":
            return f"transformers {self.implementation}"
        return "transformers disk offload"


def subjects(config: BenchConfig) -> tuple[Subject, ...]:
    """The rows of a run, in the order in which they are measured."""
    rows = [
        Subject("finemoe", budget=budget, policy=policy, expert_dtype=dtype)
        for policy, dtype, budget in product(config.policies, config.expert_dtypes, config.budgets)
    ]
    rows += [Subject("resident", implementation=n) for n in config.baseline_names if n != DISK_OFFLOAD]
    if DISK_OFFLOAD in config.baseline_names:
        rows.append(Subject("disk-offload", implementation="eager"))
    return tuple(rows)


@dataclass(frozen=True)
class Order:
    """All that the process of one row needs to know."""

    subject: Subject
    load: dict[str, Any]  # fields of a LoadConfig
    prompt: tuple[int, ...]
    context: tuple[int, ...]
    new_tokens: int
    threads: int
    expert_bytes: int = 1 << 20  # finemoe: how much the disk is asked for in a row, to measure it
    memory_bytes: int = 0  # disk-offload: for weights
    offload_folder: str = ""
    requests: tuple[tuple[int, ...], ...] = ()  # real prompts, instead of `prompt` and `context`
    warm: tuple[tuple[int, ...], ...] = ()  # to answer before them, unmeasured
    store: str = ""  # a trace, to learn from before all of that
    replay_routing: str | None = None  # the trace whose routing is forced onto the subject
    text: tuple[int, ...] = ()  # to measure perplexity on, afterwards

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Order:
        given: dict[str, Any] = {name: tuple(raw.pop(name)) for name in ("prompt", "context", "text")}
        given |= {name: tuple(tuple(ids) for ids in raw.pop(name)) for name in ("requests", "warm")}
        return cls(subject=Subject(**raw.pop("subject")), **given, **raw)


@dataclass(frozen=True)
class Phase:
    """One phase of a run: the prompt, or the tokens after it. Counters are finemoe's; 0 for others."""

    seconds: tuple[float, ...]  # of each step
    disk_bytes: int | None  # read from storage by the process, as the kernel counts; None where it does not
    accesses: int = 0
    hits: int = 0
    late: int = 0
    bytes_read: int = 0
    stall_s: float = 0.0
    stalled_bytes: int = 0
    befores: Durations = NEVER  # these: see Tempo
    afters: Durations = NEVER
    arounds: Durations = NEVER
    begins: Durations = NEVER  # these: see Thoughts
    gates: Durations = NEVER
    urgent_s: float = 0.0  # these: see Moved
    urgent_bytes: float = 0.0
    prefetch_s: float = 0.0
    prefetch_bytes: float = 0.0
    passages: Durations = NEVER
    link_bytes_s: float | None = None  # raw bandwidth, measured between the steps; None where it was not

    @property
    def total_s(self) -> float:
        return sum(self.seconds)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Phase:
        timed: dict[str, Any] = {name: Durations(**raw.pop(name)) for name in _TIMED}
        return cls(seconds=tuple(raw.pop("seconds")), **timed, **raw)


@dataclass(frozen=True)
class Measured:
    """What one process measured."""

    load_s: float  # from the call to the loaded model; imports excluded
    prompt: Phase  # one step: the time to the first token after a cold start
    decode: Phase
    tokens: tuple[int, ...]
    logits: tuple[str, ...]  # a hash of each token's logits, bit for bit
    dense_bytes: int  # weights in memory that are not in the pool
    pool_bytes: int
    peak_rss_bytes: int
    torch_threads: int
    explained: tuple[ExplainRow, ...] | None = None  # of decoding, with --explain
    perplexity: float | None = None

    @property
    def weight_bytes(self) -> int:
        """Dense weights and pool: what must be in memory."""
        return self.dense_bytes + self.pool_bytes

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Measured:
        prompt, decode = Phase.from_dict(raw.pop("prompt")), Phase.from_dict(raw.pop("decode"))
        tokens, logits = tuple(raw.pop("tokens")), tuple(raw.pop("logits"))
        explained = explained_from(raw.pop("explained"))
        return cls(prompt=prompt, decode=decode, tokens=tokens, logits=logits, explained=explained, **raw)


def counted(offload: Any) -> dict[str, Any]:
    """What `model.finemoe` has counted, by the names of `COUNTED`."""
    kept = (
        (offload.stats(), _COUNTED), (offload.layer_timing, TOTALS), (offload.policy_timings, POLICY_TIMINGS),
        (offload.link_totals, LINK_TOTALS),
    )  # fmt: skip
    return {name: getattr(each, name) for each, names in kept for name in names}


def explained_from(raw: list[dict[str, Any]] | None) -> tuple[ExplainRow, ...] | None:
    """What `--explain` tells, out of JSON."""
    return None if raw is None else tuple(ExplainRow.from_dict(row) for row in raw)


@dataclass(frozen=True)
class Answer:
    """One request, greedy. `decode` has a step for each token after the first; none if the first ended it."""

    prompt_tokens: int
    prompt: Phase  # one step: the time to the first token
    decode: Phase
    tokens: tuple[int, ...]
    logits: str  # a hash of the logits of all tokens, bit for bit

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Answer:
        prompt, decode = Phase.from_dict(raw.pop("prompt")), Phase.from_dict(raw.pop("decode"))
        return cls(prompt=prompt, decode=decode, tokens=tuple(raw.pop("tokens")), **raw)


@dataclass(frozen=True)
class Answered:
    """All requests of a row, in order, under a policy that learned from one to the next."""

    load_s: float  # from the call to the loaded model; imports excluded
    answers: tuple[Answer, ...]
    prefetched: int
    prefetched_used: int
    wasted: int
    dense_bytes: int  # weights in memory that are not in the pool
    pool_bytes: int
    peak_rss_bytes: int
    torch_threads: int
    explained: tuple[ExplainRow, ...] | None = None  # with --explain
    perplexity: float | None = None
    expert_bytes: float = 0.0  # of one, as it is stored; 0 where none is offloaded

    @property
    def tokens(self) -> tuple[tuple[int, ...], ...]:
        return tuple(answer.tokens for answer in self.answers)

    @property
    def logits(self) -> tuple[str, ...]:
        return tuple(answer.logits for answer in self.answers)

    @property
    def tokens_digest(self) -> str:
        """A hash of all output token ids: the same for every policy and budget, or one of them is wrong."""
        return hashlib.sha256(repr(self.tokens).encode()).hexdigest()[:16]

    @property
    def weight_bytes(self) -> int:
        """Dense weights and pool: what must be in memory."""
        return self.dense_bytes + self.pool_bytes

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> Answered:
        answers = tuple(Answer.from_dict(answer) for answer in raw.pop("answers"))
        explained = explained_from(raw.pop("explained"))
        return cls(answers=answers, explained=explained, **raw)


MIMIC_NAMES: tuple[str, ...] = (
    "layer_s", "expert_s", "outside_s", "link_ratio", "before_gate", "gap", "lag", "begin_lag", "prefetch_slowdown",
    "compute_spread", "link_spread", "lag_spread", "tokens_per_unit",
)  # fmt: skip


def mimic(prompts: Sequence[tuple[int, Phase]], decode: Phase, expert_bytes: float) -> dict[str, float | None]:
    """Figures by name; `None` where a model was not offloaded, has a single MoE layer, or answered nothing.

    - `layer_s`: one layer's compute for one token while decoding, as slow as readers and policy beside it make it, but
      without waiting for experts; `before_gate`: the share of it before the gate speaks;
    - `expert_s`: for how long the link is busy to move one urgent expert, while decoding;
    - `outside_s`: from the last MoE layer of a token to the first of the next: head, sampling, embedding;
    - `link_ratio`, `gap`: `expert_s` and `outside_s` in units of `layer_s`;
    - `lag`, `begin_lag`: in the same units, the mean time from a gate, and from an iteration's begin, until what a
      policy beside the model made of it counted; waiting for an earlier thought is not in it;
    - `lag_spread`: the standard deviation of the logarithm of that from a gate;
    - `prefetch_slowdown`: how many times as long it takes to move one that is not urgent;
    - `compute_spread`: the standard deviation of the logarithm of the time from a layer's end to the next gate;
    - `link_spread`: the same of the time to move an expert, of prefetches that nothing else disturbed;
    - `tokens_per_unit`: how many tokens of a prompt a layer computes in the time of one; over all prompts together.

    Args:
        prompts: the tokens and the prefill of each.
        decode: of all requests together.
        expert_bytes: of one expert.
    """
    found: dict[str, float | None] = dict.fromkeys(MIMIC_NAMES)
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
    if (around_s := decode.arounds.mean_s) is not None:  # up to the first gate, so with that layer's part before it
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
    """Without anything urgent, or any prefetch, both are as fast."""
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
    """Compute of one layer, the mean over layers and passes."""
    before_s, after_s = phase.befores.mean_s, phase.afters.mean_s
    return None if before_s is None or after_s is None else before_s + after_s
