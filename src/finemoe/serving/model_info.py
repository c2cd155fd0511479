"""The served model without its tensors: name, tokenizer, worker, limits; what requests are checked against."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from finemoe import __version__
from finemoe.metrics import Stats
from finemoe.model import context_tokens
from finemoe.serving.config import ServeConfig
from finemoe.serving.scheduler.job import Worker
from finemoe.serving.structured_output import GrammarVocabulary

SYSTEM_FINGERPRINT = f"finemoe-{__version__}"
UNBOUNDED = 1 << 20  # context length in tokens where the model's config gives none


@dataclass(frozen=True)
class ServedModel:
    """The served model.

    Args:
        name: the model's name in requests.
        tokenizer: a transformers tokenizer.
        worker: runs the jobs.
        stats: returns the statistics of the expert pool.
        stop_ids: token ids that end an answer.
        context_tokens: the longest prompt plus answer.
        vocabulary_size: columns of the logits; the tokenizer may have fewer tokens.
        config: the server's settings.
        created_s: start of the server, seconds since the epoch.
    """

    name: str
    tokenizer: Any
    worker: Worker
    stats: Callable[[], Stats]
    stop_ids: frozenset[int]
    context_tokens: int
    vocabulary_size: int
    config: ServeConfig
    created_s: int = field(default_factory=lambda: int(time.time()))

    @cached_property
    def vocabulary(self) -> GrammarVocabulary:
        """Token texts and grammars. Slow on first use of some methods; see `GrammarVocabulary.prepare`."""
        return GrammarVocabulary(self.tokenizer, self.vocabulary_size, sorted(self.stop_ids))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        text: str = self._decoder.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    @cached_property
    def _decoder(self) -> Any:
        """A copy: tokenizers are not thread-safe, and prompts are encoded on another thread."""
        return deepcopy(self.tokenizer)

    @property
    def max_prompt_tokens(self) -> int:
        """The longest accepted prompt; leaves room for at least one token of answer."""
        return min(self.config.max_prompt_tokens or self.context_tokens, self.context_tokens - 1)


def served_model(
    model: Any, tokenizer: Any, worker: Worker, config: ServeConfig, capacity_tokens: int = UNBOUNDED
) -> ServedModel:
    """Describes a loaded model for the server.

    Args:
        model: from `finemoe.load`.
        tokenizer: of the model's folder.
        worker: runs `model`.
        config: the server's settings.
        capacity_tokens: the longest prompt plus answer that the worker can hold.
    """
    text_config = model.config.get_text_config()
    return ServedModel(
        name=config.served_name or default_model_name(model.finemoe.checkpoint.name),
        tokenizer=tokenizer,
        worker=worker,
        stats=model.finemoe.stats,
        stop_ids=_stop_ids(model.generation_config.eos_token_id, tokenizer.eos_token_id),
        context_tokens=min(context_tokens(model.config) or UNBOUNDED, capacity_tokens),
        vocabulary_size=text_config.vocab_size,
        config=config,
    )


def default_model_name(model: str) -> str:
    """A model's name in requests: the hub id, or the last part of a folder's path."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _stop_ids(*eos_token_ids: int | Sequence[int] | None) -> frozenset[int]:
    """The union of end-of-sequence ids, each given as one id, a list, or `None`."""
    return frozenset(i for ids in eos_token_ids if ids is not None for i in ([ids] if isinstance(ids, int) else ids))
