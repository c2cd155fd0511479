"""Samples the next token from the logits with llama.cpp's samplers, in its default order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from finemoe.gguf.binding import Library
from finemoe.gguf.context import Context

_RANDOM_SEED = 0xFFFFFFFF  # the library replaces this value with a random seed


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling settings: greedy unless a temperature is set. Defaults have no effect."""

    temperature: float = 0.0
    top_k: int = 0  # sample from the k most likely tokens; 0: from all
    top_p: float = 1.0  # sample from the smallest set of tokens with this total probability
    min_p: float = 0.0  # minimum probability, relative to the most likely token
    repetition_penalty: float = 1.0  # divides positive logits of earlier tokens, multiplies negative ones
    frequency_penalty: float = 0.0  # subtracted for each earlier occurrence
    presence_penalty: float = 0.0  # subtracted once if the token occurred
    penalty_tokens: int = 64  # window of the penalties
    seed: int = 0

    @property
    def penalises(self) -> bool:
        """Whether any penalty is set."""
        return (self.repetition_penalty, self.frequency_penalty, self.presence_penalty) != (1.0, 0.0, 0.0)


class TokenSampler:
    """Samples the tokens of one answer.

    Args:
        library: the loaded library.
        options: sampling settings.
        vocabulary: number of tokens in the vocabulary.
        before: earlier tokens, for penalties.
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
        """Sample the token that follows the context's last one."""
        token: int = self._api.llama_sampler_sample(self._chain, context.handle, -1)
        return token

    def close(self) -> None:
        """Free the sampler."""
        if self._chain:
            self._api.llama_sampler_free(self._chain)
            self._chain = None

    def _add(self, sampler: int) -> None:
        self._api.llama_sampler_chain_add(self._chain, sampler)
