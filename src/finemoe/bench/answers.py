"""What one process measured while it answered real prompts. Plain data, for JSON."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from finemoe.bench.subject import Phase, explained_from
from finemoe.explain import Explained


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
    explained: tuple[Explained, ...] | None = None  # with --explain
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
