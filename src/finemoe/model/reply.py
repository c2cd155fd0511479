"""An answer and what it took, whatever backend gave it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from finemoe.errors import ConfigError, FinemoeWarning
from finemoe.metrics import Stats


@dataclass(frozen=True)
class Reply:
    """One answer, and what it took."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str  # "stop": the model ended it; "length": max_new_tokens or the context did
    ttft_s: float  # time to first token
    tpot_s: float  # mean time per token after the first; 0 for a single token
    total_s: float
    stats: Stats  # of this answer alone

    @property
    def tok_s(self) -> float:
        return len(self.token_ids) / self.total_s if self.total_s else 0.0

    @property
    def stall_share(self) -> float:
        """Of the time that this answer took, the part spent waiting for experts."""
        return min(1.0, self.stats.stall_s / self.total_s) if self.total_s else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return self.stats.as_dict() | {
            "text": self.text,
            "tokens": len(self.token_ids),
            "token_ids": self.token_ids,
            "prompt_tokens": self.prompt_tokens,
            "finish_reason": self.finish_reason,
            "ttft_s": self.ttft_s,
            "tpot_s": self.tpot_s,
            "tok_s": self.tok_s,
            "total_s": self.total_s,
            "stall_share": self.stall_share,
        }


def fitting_tokens(limit: int | None, prompt_tokens: int, max_new_tokens: int) -> int:
    """As many new tokens as are asked for and fit behind the prompt in a context of `limit` tokens; warns if fewer.

    Raises:
        ConfigError: not one fits.
    """
    if limit is None or prompt_tokens + max_new_tokens <= limit:
        return max_new_tokens
    if prompt_tokens >= limit:
        raise ConfigError(
            f"PROMPT: has {prompt_tokens} tokens, and the model's context holds {limit}, at least one of them an "
            "answer's; shorten it"
        )
    warnings.warn(  # the same text each time: shown once
        f"--max-new-tokens: {max_new_tokens} do not fit behind the prompt; an answer ends where the model's "
        f"context of {limit} tokens does",
        FinemoeWarning,
        stacklevel=3,
    )
    return limit - prompt_tokens
