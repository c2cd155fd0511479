"""Log probabilities of tokens, in the two shapes of OpenAI's endpoints."""

from __future__ import annotations

from collections.abc import Sequence

from finemoe.serving.answer import Said
from finemoe.serving.objects import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob
from finemoe.serving.vocabulary import Vocabulary

_LEAST = -9999.0  # JSON has no infinity; OpenAI's stand-in


def chat_logprobs(vocabulary: Vocabulary, said: Sequence[Said]) -> ChatLogprobs:
    """Of a chat's tokens."""
    return ChatLogprobs(content=[_chat_logprob(vocabulary, one) for one in said], refusal=None)


def _chat_logprob(vocabulary: Vocabulary, said: Said) -> ChatLogprob:
    token = said.token
    return ChatLogprob(
        token=vocabulary.text(token.id),
        logprob=_finite(token.logprob),
        bytes=list(vocabulary.bytes(token.id)),
        top_logprobs=[
            TopLogprob(token=vocabulary.text(i), logprob=_finite(logprob), bytes=list(vocabulary.bytes(i)))
            for i, logprob in token.likeliest
        ],
    )


def completion_logprobs(vocabulary: Vocabulary, said: Sequence[Said]) -> CompletionLogprobs:
    """Of a completion's tokens."""
    return CompletionLogprobs(
        text_offset=[one.start for one in said],
        token_logprobs=[_finite(one.token.logprob) for one in said],
        tokens=[vocabulary.text(one.token.id) for one in said],
        top_logprobs=[
            {vocabulary.text(i): _finite(logprob) for i, logprob in reversed(one.token.likeliest)} for one in said
        ],
    )


def _finite(logprob: float | None) -> float:
    return max(_LEAST, logprob) if logprob is not None else _LEAST
