"""airllm: streams a model layer by layer, from a copy of the checkpoint with one file per layer."""

from __future__ import annotations

import sys
from pathlib import Path

from finemoe_peer import decoder
from peer import Order, Peer, Tokens, main


def load(order: Order) -> Tokens:
    import torch
    from airllm import AirLLMBaseModel, AutoModel

    AirLLMBaseModel.get_tokenizer = lambda *_, **__: (
        None
    )  # prompts are token ids; transformers 4 can't read all tokenizer files
    torch.set_num_threads(order.threads)
    split = Path(order.work) / "airllm"
    split.mkdir(exist_ok=True)
    return decoder(AutoModel.from_pretrained(order.model, device="cpu", layer_shards_saving_path=str(split)))


def prepare(order: Order) -> None:
    load(order)  # writes the copy


# torch as for the other rows; transformers 5 expects fused experts, which airllm's files do not have
PEER = Peer("airllm", ("torch==2.13.0", "airllm==4.0.0", "transformers==4.57.*"), "airllm", load, prepare)

if __name__ == "__main__":
    sys.exit(main(PEER))
