"""Checkpoints of published shapes with random weights, and synthetic routing, for `gpu_bench.py`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make_checkpoint import SHAPES, meta_model, shards, tensor_shapes
from safetensors.torch import save_file
from transformers import AutoConfig, PreTrainedConfig

from finemoe.trace import DECODE, PREFILL, RequestTrace, TraceHeader, TraceWriter

KEPT = 0.5  # synthetic routing: probability that a token's expert is used by the next token too
SKEW = 1.0  # synthetic routing: Zipf exponent of the other experts' popularity within a request

_GPT_OSS: dict[str, Any] = {
    "hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 32, "num_experts_per_tok": 4,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 201088,
}  # fmt: skip
_TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 96, "num_local_experts": 8, "num_experts_per_tok": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 128,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict[str, Any]]] = {  # name -> model type, config
    "mixtral-8x7b": (SHAPES["mixtral-8x7b"][0], SHAPES["mixtral-8x7b"][2]),
    "qwen1.5-moe": (SHAPES["qwen1.5-moe"][0], SHAPES["qwen1.5-moe"][2]),
    "gpt-oss-20b": ("gpt_oss", _GPT_OSS),
    "tiny": ("mixtral", _TINY),
}
PUBLISHED_LAYERS = {"mixtral-8x7b": 32, "qwen1.5-moe": 24, "gpt-oss-20b": 24, "tiny": 3}


def make_config(kind: str, experts_gib: float) -> PreTrainedConfig:
    """The config of a shape, with as many of its layers as fit into `experts_gib` of routed experts."""
    model_type, values = KINDS[kind]
    active = values["num_experts_per_tok"]
    experts = values.get("num_local_experts") or values["num_experts"]
    width = values.get("moe_intermediate_size", values["intermediate_size"])
    layer_bytes = 2 * 3 * experts * values["hidden_size"] * width
    layers = max(2, min(PUBLISHED_LAYERS[kind], int(experts_gib * 2**30 / layer_bytes)))
    config = AutoConfig.for_model(
        model_type, num_hidden_layers=layers, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
        pad_token_id=None, dtype="bfloat16", **values,
    )  # fmt: skip
    assert config.num_experts_per_tok == active
    config.architectures = [type(meta_model(config)).__name__]
    return config


def write_checkpoint(folder: Path, config: PreTrainedConfig, device: torch.device) -> int:
    """Writes random weights, drawn on `device`. Returns the bytes of all routed experts."""
    folder.mkdir(parents=True, exist_ok=True)
    shapes = tensor_shapes(config)
    generator = torch.Generator(device).manual_seed(0)
    files, where = shards(shapes), {}
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05}-of-{len(files):05}.safetensors"
        save_file({name: _draw(name, shapes[name], generator) for name in names}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    config.save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return sum(2 * math.prod(shape) for name, shape in shapes.items() if ".experts." in name)


def _draw(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    if len(shape) == 1 or name.endswith("bias"):
        return torch.full(shape, 0.0 if name.endswith("bias") or "sinks" in name else 1.0, dtype=torch.bfloat16)
    spread = 1.0 if "embed_tokens" in name else 0.3 / math.sqrt(min(shape[-2:]))
    values = torch.empty(shape, dtype=torch.bfloat16, device=generator.device).normal_(0, spread, generator=generator)
    return values.cpu()


def write_routing(path: Path, config: PreTrainedConfig, requests: int, prompt: int, decoded: int) -> Path:
    """Writes synthetic routing for shapes without a recorded trace: fit to measure the data path, not policies.

    In each layer, a token keeps each expert of the token before with probability `KEPT`; the others are drawn by a
    Zipf distribution over the experts that differs from request to request.
    """
    experts = next(getattr(config, n) for n in ("num_local_experts", "num_experts") if hasattr(config, n))
    layers, active = config.num_hidden_layers, config.num_experts_per_tok
    header = TraceHeader(
        model=str(config.architectures[0]), layers=layers, experts=experts, active=active,
        fields=("weights", "probs"), source="synthetic",
    )  # fmt: skip
    draw = np.random.default_rng(0)
    with TraceWriter(path, header, overwrite=True) as writer:
        for _ in range(requests):
            ids = np.stack(list(_draw_tokens(draw, layers, experts, active, prompt + decoded)))  # [n, L, K]
            weights = -np.sort(-draw.dirichlet(np.full(active, 4.0), ids.shape[:2]), 2)
            probs = np.zeros((len(ids), layers, experts), np.float16)
            np.put_along_axis(probs, ids, weights.astype(np.float16), 2)
            writer.add(
                RequestTrace(
                    phases=np.array([PREFILL] + [DECODE] * decoded, np.uint8),
                    rows=np.array([0, *range(prompt, prompt + decoded + 1)]),
                    token_ids=draw.integers(0, config.vocab_size, len(ids), dtype=np.int32),
                    expert_ids=ids.astype(header.id_dtype),
                    weights=weights.astype(np.float16),
                    probs=probs,
                )
            )
    return path


def _draw_tokens(draw: np.random.Generator, layers: int, experts: int, active: int, tokens: int) -> Iterator[Any]:
    popularity = np.log(np.arange(1, experts + 1)) * -SKEW
    score = np.stack([draw.permutation(popularity) for _ in range(layers)])
    last = np.zeros((layers, experts), bool)
    for _ in range(tokens):
        kept = last & (draw.random(last.shape) < KEPT)
        chosen = np.argsort(-(score + draw.gumbel(size=score.shape) + 100 * kept), axis=1)[:, :active]
        last = np.zeros_like(last)
        np.put_along_axis(last, chosen, values=True, axis=1)
        yield chosen
