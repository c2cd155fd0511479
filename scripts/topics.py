"""Embeddings and head that make routing balanced and local, like a trained model's; for `make_checkpoint.py`.

The vocabulary is one cycle (the walk). Each token has two likely successors, the next token of the walk and the one
after, and the output of attention and experts decides between them: decoding never enters a short loop, and a wrong
expert changes the text. The walk stays with one topic for `STRETCH` tokens, then moves to another. An embedding is the
sum of its topic's vector and a smaller one of its own, so routers, which are random, choose similar experts while a
topic lasts. All topics are equally frequent and their vectors random, so experts are used equally. The head looks at
the tokens' own vectors only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# chosen so that LRU's hit rate is near that on recorded routing of gpt-oss-20b; see docs/benchmarks.md
TOPICS = 64
STRETCH = 64  # consecutive tokens of the walk with the same topic
TOPIC_SHARE = 0.62  # of an embedding's power


@dataclass(frozen=True)
class Topics:
    """Topics and successors of `V` tokens, and their vectors of width `D`."""

    topic: Tensor  # [V], of each token
    following: Tensor  # [V, 2], successors of each token
    vectors: Tensor  # [topics, D], of each topic
    own: Tensor  # [V, D], of each token

    def embedding(self) -> Tensor:
        """`[V, D]`, of RMS 1."""
        return self.vectors[self.topic].mul(TOPIC_SHARE**0.5).add_(self.own, alpha=(1 - TOPIC_SHARE) ** 0.5)

    def head(self) -> Tensor:
        """`[V, D]`: each token's row is the sum of the own vectors of its two predecessors."""
        made = torch.zeros_like(self.own)
        for successors in self.following.T:
            made.index_add_(0, successors, self.own)
        return made.div_((2 * self.own.shape[1]) ** 0.5)

    def walk(self, tokens: int, generator: torch.Generator) -> list[int]:
        """A random prompt along the walk, as token ids."""
        at = int(torch.randint(len(self.topic), (1,), generator=generator))
        ids = [at]
        for turn in torch.randint(2, (tokens - 1,), generator=generator).tolist():
            ids.append(int(self.following[ids[-1], turn]))
        return ids


def make_topics(vocabulary: int, width: int, seed: int) -> Topics:
    """Deterministic in sizes and seed. Allocates the embedding matrix in float32."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(vocabulary, generator=generator)
    stretches = -(-vocabulary // STRETCH)
    topic_of_stretch = torch.randperm(stretches, generator=generator) % TOPICS
    topic = torch.empty(vocabulary, dtype=torch.long)
    topic[order] = topic_of_stretch.repeat_interleave(STRETCH)[:vocabulary]
    following = torch.empty(vocabulary, 2, dtype=torch.long)
    following[order] = torch.stack([order.roll(-1), order.roll(-2)], 1)
    vectors = torch.randn(TOPICS, width, generator=generator)
    return Topics(topic, following, vectors, torch.randn(vocabulary, width, generator=generator))
