"""neurostream: streams blocks of rows from a GGUF file, and keeps what fits into its RAM budget resident."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from peer import Order, Peer, Tokens, main

FILE = "model.gguf"  # written by run.py
ARENA_BYTES = 256 << 20  # buffers for streamed weights
OVERHEAD_BYTES = 1 << 30  # interpreter, torch, weights expanded to float32


def load(order: Order) -> Tokens:
    import torch
    from neurostream import NeuroStream
    from neurostream.model.qwen3 import KVCache

    torch.set_num_threads(order.threads)
    memory_bytes = order.memory_bytes or 1 << 40
    engine = NeuroStream.load(
        str(Path(order.work) / FILE),
        mem_budget=ARENA_BYTES,
        ram_budget=max(0, memory_bytes - ARENA_BYTES - OVERHEAD_BYTES),
        device="cpu",
    )

    @torch.no_grad()
    def tokens(prompt: list[int]) -> Iterator[int]:  # like its `generate`, which returns text only
        cache, position, ids = KVCache(engine.cfg.n_layer), 0, prompt
        while True:
            logits = engine.model.forward(torch.tensor(ids), cache, start_pos=position)
            position += len(ids)
            ids = [int(logits[-1].argmax())]
            yield ids[0]

    return tokens


PEER = Peer("neurostream", ("torch==2.13.0", "neurostream==0.2.1"), "neurostream", load)

if __name__ == "__main__":
    sys.exit(main(PEER))
