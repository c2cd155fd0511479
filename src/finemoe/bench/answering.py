"""Answers requests one after another, greedily, and times and counts prompt and continuation of each apart."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from finemoe.bench.answers import Answer
from finemoe.bench.requests import Request
from finemoe.bench.subject import Phase, counted


def answer_all(model: Any, requests: Sequence[Request], new_tokens: int, piece: int | None = None) -> list[Answer]:
    """Answers `requests` in order.

    Nothing happens between two requests or two tokens but the bookkeeping of this: an idle link would go on
    prefetching, and so flatter those that do.

    Args:
        new_tokens: an answer ends after so many, or where the model ends it.
        piece: feed prompts so many tokens at a time; `None`: whole.
    """
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    with torch.no_grad():
        return [_answer(model, request, new_tokens, ends, piece or len(request)) for request in requests]


def _answer(model: Any, request: Request, new_tokens: int, ends: set[int | None], piece: int) -> Answer:
    cache: Any = None
    tokens: list[int] = []
    logits = hashlib.sha256()

    def step(inputs: Sequence[Tensor]) -> float:
        """One token. Returns its time."""
        nonlocal cache
        start_s = time.perf_counter()
        for ids in inputs:
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
        last = output.logits[:, -1:]
        tokens.append(int(last.argmax(-1)))
        taken_s = time.perf_counter() - start_s
        logits.update(last.contiguous().view(torch.uint8).numpy().tobytes())
        return taken_s

    count = _Count(model)
    seconds = [step(pieces(request, piece))]
    prompt = count.phase(seconds)
    seconds = []
    while len(tokens) < new_tokens and tokens[-1] not in ends:
        seconds.append(step([torch.tensor([tokens[-1:]])]))
    decode = count.phase(seconds)
    return Answer(len(request), prompt, decode, tuple(tokens), logits.hexdigest()[:16])


def pieces(prompt: Sequence[int], most: int) -> list[Tensor]:
    """A prompt's ids `[1, n]`, at most so many at a time; none alone after others, which would look like decoding."""
    ids = torch.tensor([list(prompt)])
    return list(ids.tensor_split(-(-ids.shape[1] // most), dim=1))


class _Count:
    """What the engine counted since the last phase. Never resets it: prefetches span phases."""

    def __init__(self, model: Any) -> None:
        self._offload = getattr(model, "finemoe", None)
        self._before = self._now()

    def phase(self, seconds: Sequence[float]) -> Phase:
        before, self._before = self._before, self._now()
        grown = {name: value - before[name] for name, value in self._before.items()}
        return Phase(tuple(seconds), disk_bytes=None, **grown)

    def _now(self) -> dict[str, Any]:
        return {} if self._offload is None else counted(self._offload)
