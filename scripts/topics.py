"""Weights from which routing follows that is balanced and local, as trained models' is; for `make_checkpoint.py`.

A vocabulary is laid out as one long walk, a cycle through all of it. Each token has two likely successors, the next of
the walk and the one after, and what attention and experts add decides between them: so decoding never falls into a
short loop, and a wrong expert shows. The walk stays with a topic for a stretch, then turns to another. A token's
embedding is mostly its topic's vector, the rest its own; so every router, random as it is, sees much the same from
token to token while the topic lasts, and something else later. All topics are equally frequent and their vectors
random, so all experts are used alike. The head knows tokens by what is their own, not by their topic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# chosen so that LRU's hits come near those on recorded routing of gpt-oss-20b; see docs/benchmarks.md
TOPICS = 64
STRETCH = 64  # tokens of the walk before it turns to another topic
TOPIC_SHARE = 0.62  # of an embedding's power


@dataclass(frozen=True)
class Topics:
    """What `V` tokens are about, and what follows them."""

    topic: Tensor  # [V]
    following: Tensor  # [V, 2], the successors of each
    vectors: Tensor  # [topics, D]
    own: Tensor  # [V, D], of each token

    def embedding(self) -> Tensor:
        """`[V, D]`, of RMS 1."""
        return self.vectors[self.topic].mul(TOPIC_SHARE**0.5).add_(self.own, alpha=(1 - TOPIC_SHARE) ** 0.5)

    def head(self) -> Tensor:
        """`[V, D]`: each token answers to what is its two predecessors' own."""
        made = torch.zeros_like(self.own)
        for successors in self.following.T:
            made.index_add_(0, successors, self.own)
        return made.div_((2 * self.own.shape[1]) ** 0.5)

    def walk(self, tokens: int, generator: torch.Generator) -> list[int]:
        """Token ids as the model might have decoded them: a prompt."""
        at = int(torch.randint(len(self.topic), (1,), generator=generator))
        ids = [at]
        for turn in torch.randint(2, (tokens - 1,), generator=generator).tolist():
            ids.append(int(self.following[ids[-1], turn]))
        return ids


def make_topics(vocabulary: int, width: int, seed: int) -> Topics:
    """The same for the same sizes and seed. Holds the embedding matrix in float32."""
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
