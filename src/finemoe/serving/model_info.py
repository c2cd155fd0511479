"""The model as the server sees it: no tensors, and everything that a request is checked against."""

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

UNBOUNDED = 1 << 20  # tokens of context, where a model's config names no bound


@dataclass(frozen=True)
class Served:
    """What is served.

    Args:
        name: of the model, in requests.
        tokenizer: transformers'.
        worker: runs the jobs.
        stats: what the expert pool did so far.
        stop_ids: tokens that end an answer.
        context_tokens: the longest prompt and answer together.
        vocabulary_size: columns of the logits; the tokenizer may know fewer tokens.
        config: of the server.
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
        """Tokens as text and as bytes, and the grammars over them. Takes a moment when first used."""
        return GrammarVocabulary(self.tokenizer, self.vocabulary_size, sorted(self.stop_ids))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of an answer's tokens."""
        text: str = self._decoder.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    @cached_property
    def _decoder(self) -> Any:
        """A tokenizer can't be set up for a prompt in one thread while it decodes in another."""
        return deepcopy(self.tokenizer)

    @property
    def max_prompt_tokens(self) -> int:
        """The context holds at least one token of answer besides."""
        return min(self.config.max_prompt_tokens or self.context_tokens, self.context_tokens - 1)


def served(model: Any, tokenizer: Any, worker: Worker, config: ServeConfig, capacity_tokens: int = UNBOUNDED) -> Served:
    """A loaded model, ready to be served.

    Args:
        model: from `finemoe.load`.
        tokenizer: of the model's folder.
        worker: runs `model`.
        config: of the server.
        capacity_tokens: the longest prompt and answer together that the worker can hold.
    """
    text_config = model.config.get_text_config()
    return Served(
        name=config.served_name or own_name(model.finemoe.checkpoint.name),
        tokenizer=tokenizer,
        worker=worker,
        stats=model.finemoe.stats,
        stop_ids=stop_ids(model.generation_config.eos_token_id, tokenizer.eos_token_id),
        context_tokens=min(context_tokens(model.config) or UNBOUNDED, capacity_tokens),
        vocabulary_size=text_config.vocab_size,
        config=config,
    )


def own_name(given: str) -> str:
    """A model's name in requests: the hub id, or the folder's last part."""
    return Path(given).resolve().name if Path(given).is_dir() else given


def stop_ids(*ends: int | Sequence[int] | None) -> frozenset[int]:
    """What ends an answer: the generation config's ids, and the tokenizer's."""
    return frozenset(i for end in ends if end is not None for i in ([end] if isinstance(end, int) else end))


FINGERPRINT = f"finemoe-{__version__}"
