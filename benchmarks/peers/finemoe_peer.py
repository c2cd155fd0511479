"""finemoe. Its expert budget is the cap, less dense weights and `OVERHEAD_BYTES`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from peer import Order, Peer, Tokens, main

OVERHEAD_BYTES = 512 << 20  # interpreter, libraries, activations, key-value cache


def load(order: Order) -> Tokens:
    import torch

    import finemoe
    from finemoe.model.describe import describe
    from finemoe.system import return_freed_memory, unmap_idle_code

    return_freed_memory()
    torch.set_num_threads(order.threads)
    budget = "all"
    if order.memory_bytes is not None:
        described = describe(order.model)
        spare = order.memory_bytes - described.dense_bytes - OVERHEAD_BYTES
        if spare < described.expert_index.slot_bytes * described.expert_index.experts:
            budget = str(max(spare, 1))
    model = finemoe.load(order.model, expert_memory=budget, policy=order.policy, map_store="none")
    unmap_idle_code()
    return decoder(model)


def decoder(model: object) -> Tokens:
    """Greedy decoding of a transformers model, token by token."""
    import torch

    @torch.no_grad()
    def tokens(prompt: list[int]) -> Iterator[int]:
        ids, cache = torch.tensor([prompt]), None
        while True:
            output = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, ids = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            yield int(ids)

    return tokens


def prepare(order: Order) -> None:
    """Compiles the policy's kernels, once per machine and shape; they are cached."""
    tokens = load(order)([1])
    next(tokens)
    next(tokens)


PEER = Peer("finemoe", (), "finemoe", load, prepare)

if __name__ == "__main__":
    sys.exit(main(PEER))
