"""Writes a checkpoint as one bfloat16 GGUF file, tensor by tensor, with the layout of llama.cpp's converter.

Supports the two families that the benchmark runs: Qwen3-MoE (`make_checkpoint.py`) and Mixtral (the reference model).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

ARCHITECTURES = {"qwen3_moe": "qwen3moe", "mixtral": "llama"}
PARTS = {  # of a layer: name in the checkpoint -> in GGUF
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
}  # fmt: skip
EXPERTS = {
    "ffn_gate_exps": ("mlp.experts.{}.gate_proj", "block_sparse_moe.experts.{}.w1"),
    "ffn_down_exps": ("mlp.experts.{}.down_proj", "block_sparse_moe.experts.{}.w2"),
    "ffn_up_exps": ("mlp.experts.{}.up_proj", "block_sparse_moe.experts.{}.w3"),
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
NARROW = gguf.GGMLQuantizationType.BF16


class Checkpoint:
    """Tensors of a sharded checkpoint by name."""

    def __init__(self, folder: Path) -> None:
        self.files = {}
        for path in sorted(folder.glob("*.safetensors")):
            opened = safe_open(path, "pt")
            self.files |= dict.fromkeys(opened.keys(), opened)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> Tensor:
        return self.files[name].get_tensor(name)


def write_gguf(folder: Path, out: Path) -> None:
    """Converts `folder`; `out` appears once it is complete.

    Raises:
        ValueError: an unsupported family.
    """
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] not in ARCHITECTURES:
        raise ValueError(f"no GGUF of a {config['model_type']} model; only of {', '.join(ARCHITECTURES)}")
    partial = out.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, ARCHITECTURES[config["model_type"]])
    describe(writer, config, folder)
    checkpoint = Checkpoint(folder)
    for name, shape, wide in (listed := list(tensors(checkpoint, config, shapes_only=True))):
        nbytes = int(np.prod(shape)) * (4 if wide else 2)
        if wide:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes)
        else:
            writer.add_tensor_info(name, (*shape[:-1], 2 * shape[-1]), np.dtype(np.uint8), nbytes, NARROW)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for (name, tensor, wide), (expected, *_) in zip(tensors(checkpoint, config), listed, strict=True):
        assert name == expected
        if wide:
            writer.write_tensor_data(tensor.float().numpy())
        else:
            writer.write_tensor_data(tensor.to(torch.bfloat16).contiguous().view(torch.uint8).numpy())
    writer.close()
    partial.replace(out)


def tensors(checkpoint: Checkpoint, config: dict[str, Any], *, shapes_only: bool = False) -> Iterator[tuple[Any, ...]]:
    """Name, tensor (or its shape), and whether it is stored in float32; in the file's order."""

    def one(name: str, tensor: Tensor, *, wide: bool) -> tuple[Any, ...]:
        return f"{name}.weight", tuple(tensor.shape) if shapes_only else tensor, wide

    for ours, theirs in OUTER.items():
        if f"{ours}.weight" in checkpoint:
            yield one(theirs, checkpoint[f"{ours}.weight"], wide=theirs == "output_norm")
    experts = config.get("num_experts") or config["num_local_experts"]
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in PARTS.items():
            name = f"model.layers.{layer}.{ours}.weight"
            if name not in checkpoint:
                continue
            tensor = checkpoint[name]
            if config["model_type"] == "mixtral" and theirs in {"attn_q", "attn_k"}:
                heads = config["num_attention_heads" if theirs == "attn_q" else "num_key_value_heads"]
                tensor = interleaved(tensor, heads)
            yield one(f"blk.{layer}.{theirs}", tensor, wide="norm" in theirs or theirs == "ffn_gate_inp")
        for theirs, forms in EXPERTS.items():
            form = next(f for f in forms if f"model.layers.{layer}.{f.format(0)}.weight" in checkpoint)
            names = [f"model.layers.{layer}.{form.format(expert)}.weight" for expert in range(experts)]
            stacked = torch.stack([checkpoint[name] for name in names])  # the most that is in memory at once
            yield one(f"blk.{layer}.{theirs}", stacked, wide=False)


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows `[heads * d, D]` reordered for the rotary embedding of llama.cpp's `llama`: rotated pairs are adjacent."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def describe(writer: gguf.GGUFWriter, config: dict[str, Any], folder: Path) -> None:
    """Writes the sizes, and a vocabulary without merges: prompts come as token ids."""
    heads, mixtral = config["num_attention_heads"], config["model_type"] == "mixtral"
    rope = config.get("rope_parameters") or {}
    head = config.get("head_dim") or config["hidden_size"] // heads
    width = config["intermediate_size" if mixtral else "moe_intermediate_size"]
    writer.add_name(folder.name)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(width)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"t{token}" for token in range(config["vocab_size"])])
    writer.add_token_types([gguf.TokenType.NORMAL] * config["vocab_size"])
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(0)  # required; ignored by the benchmark
    writer.add_add_bos_token(value=False)
