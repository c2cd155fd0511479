"""What stands in a row: a subject, the order that its process gets, and what it hands back. Plain data, for JSON."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from finemoe.bench.config import DISK_OFFLOAD, BenchConfig
from finemoe.beside import THOUGHTS
from finemoe.config import STORED
from finemoe.durations import NEVER, Durations
from finemoe.explain import Explained
from finemoe.tempo import TOTALS
from finemoe.traffic import MOVED

Kind = Literal["finemoe", "resident", "disk-offload"]
_COUNTED = ("accesses", "hits", "late", "bytes_read", "stall_s", "stalled_bytes")
COUNTED = (*_COUNTED, *TOTALS, *THOUGHTS, *MOVED)  # of the engine's, for each phase
_TIMED = (*TOTALS, *THOUGHTS, "passages")  # of these, Durations


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
    explained: tuple[Explained, ...] | None = None  # of decoding, with --explain
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
        (offload.stats(), _COUNTED), (offload.tempo, TOTALS), (offload.thoughts, THOUGHTS), (offload.traffic, MOVED)
    )  # fmt: skip
    return {name: getattr(each, name) for each, names in kept for name in names}


def explained_from(raw: list[dict[str, Any]] | None) -> tuple[Explained, ...] | None:
    """What `--explain` tells, out of JSON."""
    return None if raw is None else tuple(Explained.from_dict(row) for row in raw)
