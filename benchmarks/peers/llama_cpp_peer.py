"""llama.cpp, through llama-cpp-python built from source: a memory-mapped bfloat16 GGUF file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from peer import Order, Peer, Tokens, main

FILE = "model.gguf"  # written by run.py


def load(order: Order) -> Tokens:
    from llama_cpp import Llama

    longest = max(map(len, order.prompts)) + order.new_tokens
    model = Llama(
        str(Path(order.work) / FILE),
        n_ctx=longest + 8,
        n_threads=order.threads,
        n_threads_batch=order.threads,
        use_mmap=True,
        verbose=False,
    )

    def tokens(prompt: list[int]) -> Iterator[int]:
        yield from model.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0)

    return tokens


PEER = Peer(
    "llama.cpp",
    ("--no-binary=llama-cpp-python", "llama-cpp-python==0.3.36"),
    "llama-cpp-python",
    load,
    build=(("CMAKE_ARGS", "-DGGML_NATIVE=ON -DMTMD_BUILD=OFF -DLLAMA_CURL=OFF"), ("CMAKE_BUILD_PARALLEL_LEVEL", "1")),
)

if __name__ == "__main__":
    sys.exit(main(PEER))
