"""How the next token is chosen from the logits: the library's own samplers, in its own usual order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finemoe.gguf.binding import Library
from finemoe.gguf.context import Context

_RANDOM_SEED = 0xFFFFFFFF  # to the library: any


@dataclass(frozen=True)
class SamplingOptions:
    """Greedy unless a temperature is given. What is left at its default has no effect."""

    temperature: float = 0.0
    top_k: int = 0  # sample from so many of the likeliest tokens; 0: from all
    top_p: float = 1.0  # sample from the smallest set of this probability
    min_p: float = 0.0  # sample from tokens at least so likely, as a share of the likeliest one's probability
    repetition_penalty: float = 1.0  # divides the logits of tokens that came before
    frequency_penalty: float = 0.0  # is subtracted for each time that a token came before
    presence_penalty: float = 0.0  # is subtracted once
    penalty_tokens: int = 64  # how far back penalties look
    seed: int = 0

    @property
    def penalises(self) -> bool:
        """Whether tokens that came before count."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)


class TokenSampler:
    """Chooses tokens of one answer.

    Args:
        library: the loaded library.
        options: how.
        vocabulary: how many tokens the model has.
        before: the tokens so far, for penalties.
    """

    def __init__(self, library: Library, options: SamplingOptions, vocabulary: int, before: Sequence[int] = ()) -> None:
        self._api = api = library.api
        self._chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if options.penalises:
            penalties = options.repetition_penalty, options.frequency_penalty, options.presence_penalty
            self._add(api.llama_sampler_init_penalties(vocabulary, options.penalty_tokens, *penalties))
        if options.temperature > 0:
            if options.top_k:
                self._add(api.llama_sampler_init_top_k(options.top_k))
            if options.top_p < 1:
                self._add(api.llama_sampler_init_top_p(options.top_p, 1))
            if options.min_p:
                self._add(api.llama_sampler_init_min_p(options.min_p, 1))
            self._add(api.llama_sampler_init_temp(options.temperature))
            self._add(api.llama_sampler_init_dist(options.seed % _RANDOM_SEED))
        else:
            self._add(api.llama_sampler_init_greedy())
        if options.penalises:
            for token in before:
                api.llama_sampler_accept(self._chain, token)

    def next(self, context: Context) -> int:
        """The token after the context's last one."""
        token: int = self._api.llama_sampler_sample(self._chain, context.handle, -1)
        return token

    def close(self) -> None:
        """Free it."""
        if self._chain:
            self._api.llama_sampler_free(self._chain)
            self._chain = None

    def _add(self, sampler: int) -> None:
        self._api.llama_sampler_chain_add(self._chain, sampler)
