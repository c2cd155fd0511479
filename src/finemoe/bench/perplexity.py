"""Perplexity on a text: what a lossy row costs, beside an exact one in the same run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - the name that torch users know

from finemoe.bench.config import BenchConfig
from finemoe.checkpoint import Checkpoint
from finemoe.errors import ConfigError
from finemoe.session import load_tokenizer

WINDOW_TOKENS = 256  # read at once, each window from its own beginning


def read_text(config: BenchConfig, checkpoint: Checkpoint) -> tuple[int, ...]:
    """Token ids to measure perplexity on; none where nothing asks for it.

    Without `--perplexity FILE`, lossy rows are measured on Python's reference manual, as this Python has it.

    Raises:
        CheckpointError: the model has no tokenizer.
        ConfigError: the file can't be read, or is too short; the message names the flag.
    """
    if config.perplexity is None and (not config.lossy or config.replay_routing is not None):
        return ()
    if config.perplexity is None:
        from pydoc_data.topics import topics

        text = "\n".join(topics[name] for name in sorted(topics))
    else:
        try:
            text = Path(config.perplexity).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"--perplexity: {config.perplexity} can't be read ({error})") from error
    # most tokenizers make at least a token of eight characters; a long book need not be encoded whole
    ids = load_tokenizer(checkpoint.folder)(text[: 64 * config.perplexity_tokens])["input_ids"]
    if len(ids) < 2:
        raise ConfigError(f"--perplexity: {config.perplexity} has fewer than two tokens")
    return tuple(ids[: config.perplexity_tokens])


@torch.no_grad()
def perplexity(model: Any, ids: Sequence[int]) -> float:
    """The exponential of the mean negative log-likelihood of each token but a window's first, given those before it."""
    total, count = 0.0, 0
    for window in torch.tensor([list(ids)]).split(WINDOW_TOKENS, dim=1):
        if window.shape[1] > 1:
            logits = model(input_ids=window, use_cache=False).logits[0, :-1].float()
            total += float(F.cross_entropy(logits, window[0, 1:], reduction="sum"))
            count += window.shape[1] - 1
    return math.exp(total / count)
