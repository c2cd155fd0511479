"""Sampling of the next token: temperature, nucleus (top-p), grammar constraint, log probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from finemoe.serving.scheduler.job import Job, Token

_NUM_SEEDS = 1 << 64  # torch generators take 64-bit seeds


class Sampler:
    """Samples the tokens of one job, in order, from a random generator of its own."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._generator = torch.Generator()
        if job.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(job.seed % _NUM_SEEDS)

    @property
    def is_greedy(self) -> bool:
        """Whether the argmax of the logits is all that is needed: no sampling, constraint or log probabilities."""
        job = self._job
        return job.temperature == 0 and job.constraint is None and job.logprobs is None

    def sample(self, logits: Tensor) -> Token:
        """The next token for logits `[V]`; the constraint, if any, advances unless the token ends the answer.

        Log probabilities are the model's: before temperature, `top_p` and constraint.

        Raises:
            ValueError: the constraint allows no token, or the logits contain NaN.
        """
        logits, job = logits.detach().to("cpu", torch.float32), self._job
        allowed = logits if job.constraint is None else job.constraint.mask(logits.clone())
        best = allowed.max()
        if not best.isfinite():
            raise ValueError("no token can come next: the constraint allows none, or the model's logits are NaN")
        token = int(allowed.argmax()) if job.temperature == 0 else self._draw((allowed - best) / job.temperature)
        if job.constraint is not None and token not in job.stop:
            job.constraint.accept(token)
        return _with_logprobs(token, logits, job.logprobs)

    def _draw(self, logits: Tensor) -> int:
        probabilities = logits.softmax(0)
        if self._job.top_p >= 1:
            return int(torch.multinomial(probabilities, 1, generator=self._generator))
        probabilities, ids = probabilities.sort(descending=True, stable=True)
        probabilities[probabilities.cumsum(0) - probabilities >= self._job.top_p] = 0  # outside the nucleus
        return int(ids[torch.multinomial(probabilities, 1, generator=self._generator)])


def _with_logprobs(token: int, logits: Tensor, count: int | None) -> Token:
    if count is None:
        return Token(token)
    logprobs = logits.log_softmax(0)
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return Token(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
