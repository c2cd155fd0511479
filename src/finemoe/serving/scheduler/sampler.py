"""Chooses a job's next token out of the model's logits. Every job draws from a generator of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from finemoe.serving.scheduler.job import Job, Token

_SEEDS = 1 << 64  # what a generator tells apart


class Sampler:
    """Chooses the tokens of one job, in order."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._generator = torch.Generator()
        if job.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(job.seed % _SEEDS)

    @property
    def plain(self) -> bool:
        """Whether it takes the likeliest token, whatever that is, and is asked for nothing else."""
        job = self._job
        return job.temperature == 0 and job.constraint is None and job.logprobs is None

    def choose(self, logits: Tensor) -> Token:
        """The next token, for the model's logits `[V]`. A constraint hears of it, unless it ends the answer.

        Log probabilities are the model's: before temperature, `top_p` and constraint.

        Raises:
            ValueError: the constraint allows no token, or the logits are no numbers.
        """
        logits, job = logits.detach().to("cpu", torch.float32), self._job
        allowed = logits if job.constraint is None else job.constraint.mask(logits.clone())
        best = allowed.max()
        if not best.isfinite():
            raise ValueError("no token may come next: the constraint allows none, or the model's logits are no numbers")
        token = int(allowed.argmax()) if job.temperature == 0 else self._draw((allowed - best) / job.temperature)
        if job.constraint is not None and token not in job.stop:
            job.constraint.accept(token)
        return _described(token, logits, job.logprobs)

    def _draw(self, logits: Tensor) -> int:
        chances = logits.softmax(0)
        if self._job.top_p >= 1:
            return int(torch.multinomial(chances, 1, generator=self._generator))
        chances, ids = chances.sort(descending=True, stable=True)
        chances[chances.cumsum(0) - chances >= self._job.top_p] = 0  # what the likelier ones have used up
        return int(ids[torch.multinomial(chances, 1, generator=self._generator)])


def _described(token: int, logits: Tensor, likeliest: int | None) -> Token:
    """A token with what was asked about it."""
    if likeliest is None:
        return Token(token)
    logprobs = logits.log_softmax(0)
    values, ids = logprobs.topk(min(likeliest, len(logprobs)))
    return Token(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
