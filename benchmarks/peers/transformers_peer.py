"""transformers' disk offload (accelerate): `device_map="auto"`, weights limited to the cap less an overhead."""

from __future__ import annotations

import sys
from pathlib import Path

from finemoe_peer import OVERHEAD_BYTES, decoder
from peer import Order, Peer, Tokens, main


def load(order: Order) -> Tokens:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(order.threads)
    arguments = {}
    if order.memory_bytes is not None:
        scratch = Path(order.work) / "offload"
        scratch.mkdir(exist_ok=True)
        arguments = {
            "device_map": "auto",
            "max_memory": {"cpu": max(1, order.memory_bytes - OVERHEAD_BYTES)},
            "offload_folder": str(scratch),
        }
    model = AutoModelForCausalLM.from_pretrained(
        order.model, dtype="auto", experts_implementation="eager", use_safetensors=True, **arguments
    )
    return decoder(model.eval())


PEER = Peer("transformers-disk-offload", (), "transformers", load)

if __name__ == "__main__":
    sys.exit(main(PEER))
