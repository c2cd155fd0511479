"""An answer with its timings and statistics, for all backends."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from finemoe.errors import ConfigError, FinemoeWarning
from finemoe.metrics import Stats


@dataclass(frozen=True)
class Reply:
    """One answer with its timings and statistics."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    finish_reason: str  # "stop": end token; "length": max_new_tokens or the context is full
    ttft_s: float  # time to first token
    tpot_s: float  # mean time per token after the first; 0 for a single token
    total_s: float
    stats: Stats  # of this answer only

    @property
    def tok_s(self) -> float:
        return len(self.token_ids) / self.total_s if self.total_s else 0.0

    @property
    def stall_share(self) -> float:
        """The fraction of `total_s` spent waiting for experts."""
        return min(1.0, self.stats.stall_s / self.total_s) if self.total_s else 0.0

    def as_dict(self) -> dict[str, Any]:
        """All fields as JSON-serializable values."""
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
    """`max_new_tokens`, reduced with a warning to what fits after the prompt in a context of `limit` tokens.

    Raises:
        ConfigError: the prompt leaves no room for a token.
    """
    if limit is None or prompt_tokens + max_new_tokens <= limit:
        return max_new_tokens
    if prompt_tokens >= limit:
        raise ConfigError(
            f"PROMPT: has {prompt_tokens} tokens, and the model's context holds {limit}, including at least one for "
            "the answer; shorten it"
        )
    warnings.warn(  # constant text, so that Python shows it once
        f"--max-new-tokens: {max_new_tokens} do not fit after the prompt; the answer ends when the model's "
        f"context of {limit} tokens is full",
        FinemoeWarning,
        stacklevel=3,
    )
    return limit - prompt_tokens
