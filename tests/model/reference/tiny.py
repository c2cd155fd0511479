"""A tiny dense model, as GGUF file and as hub snapshot, and a bundle for it."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finemoe.model.reference.bundle import ATTENTION, Bundle, load_bundle
from finemoe.model.reference.dense import DenseShape, FloatArray, layer_tensors

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("h e", "l l", "he ll", "hell o")
SHAPE = DenseShape(
    layers=7, hidden=32, neurons=64, heads=4, kv_heads=2, head_dim=8, vocab=263, max_positions=128,
    rope_theta=100000.0, rms_eps=1e-5, bos=1, eos=2, pad=2,
)  # fmt: skip


def byte_tokens() -> list[str]:
    """The 256 letters of byte-level BPE, as GPT-2 maps them."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def vocabulary() -> list[str]:
    return [*SPECIAL, *byte_tokens(), *(merge.replace(" ", "") for merge in MERGES)]


def in_bfloat16(array: NDArray[np.float64]) -> FloatArray:
    """Truncated to values that bfloat16 represents exactly, so that saving loses nothing."""
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def dense_weights(seed: int = 0) -> dict[str, FloatArray]:
    rng = np.random.default_rng(seed)
    sizes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (SHAPE.vocab, SHAPE.hidden),
        "model.norm.weight": (SHAPE.hidden,),
    }
    for layer in range(SHAPE.layers):
        sizes |= layer_tensors(SHAPE, layer)
    weights = {}
    for name, size in sizes.items():
        mean = 1.0 if len(size) == 1 else 0.0
        weights[name] = in_bfloat16(mean + rng.normal(0, 0.15, size))
    return weights


@dataclass
class ArraySource:
    """A dense source in memory; counts reads, and raises `KeyboardInterrupt` after `fail_after` of them."""

    weights: dict[str, FloatArray]
    label: str = "pypi"
    revision: str = "test"
    shape: DenseShape = SHAPE
    reads: int = 0
    fail_after: int | None = None

    def tensor(self, name: str) -> FloatArray:
        self.reads += 1
        if self.fail_after is not None and self.reads > self.fail_after:
            raise KeyboardInterrupt
        return self.weights[name]

    def write_tokenizer(self, folder: Path) -> None:
        from finemoe.model.reference.gguf_source import write_tokenizer

        write_tokenizer(
            folder,
            tokens=vocabulary(),
            token_types=[3] * len(SPECIAL) + [1] * (len(vocabulary()) - len(SPECIAL)),
            merges=MERGES,
            chat_template=TEMPLATE,
            special_ids={"bos": 1, "eos": 2, "pad": 2},
            max_positions=SHAPE.max_positions,
        )


def write_bundle(
    path: Path,
    *,
    experts: int = 4,
    top_k: int = 2,
    neurons: int = 40,
    version: str = "t",
    rank: int = 0,
    plain: bool = False,
) -> Bundle:
    """Writes a random bundle; a `plain` one has scales of 1 and the dense model's norms (from `dense_weights()`)."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(1)
    layers, d, f = SHAPE.layers, SHAPE.hidden, SHAPE.neurons
    mask = np.zeros((layers, experts, f), dtype=bool)
    for layer in range(layers):
        for expert in range(experts):
            mask[layer, expert, rng.permutation(f)[:neurons]] = True
    dense = dense_weights()
    norms = {
        name: np.stack([dense[f"model.layers.{layer}.{part}.weight"] for layer in range(layers)])
        for name, part in (("input_norm", "input_layernorm"), ("post_norm", "post_attention_layernorm"))
    }
    spread = 0.0 if plain else 0.1
    tensors: dict[str, NDArray[np.generic]] = {
        "router": rng.normal(0, 0.5, (layers, experts, d)).astype(np.float16),
        "neurons": np.packbits(mask, axis=-1, bitorder="little"),
        "scales": (1 + spread * rng.normal(size=(layers, experts, neurons))).astype(np.float16),
        "input_norm": norms["input_norm"].astype(np.float16),
        "post_norm": norms["post_norm"].astype(np.float16),
        "final_norm": dense["model.norm.weight"].astype(np.float16),
    }
    for part in ATTENTION if rank else ():
        out, into = dense[f"model.layers.0.self_attn.{part}_proj.weight"].shape
        tensors[f"delta.{part}.up"] = (0.1 * rng.normal(size=(layers, out, rank))).astype(np.float16)
        tensors[f"delta.{part}.down"] = (0.1 * rng.normal(size=(layers, rank, into))).astype(np.float16)
    save_file(tensors, path, metadata={"version": version, "top_k": str(top_k)})
    return load_bundle(path)


def permute(weight: FloatArray, heads: int) -> FloatArray:
    """Applies the row order in which llama.cpp writes query and key weights to GGUF."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def write_gguf(path: Path, weights: dict[str, FloatArray], *, quantized: bool = False) -> None:
    """Writes the dense model as a GGUF file, matrices in float32 or Q8_0."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    from finemoe.model.reference.gguf_source import gguf_name

    writer = GGUFWriter(path, "llama")
    writer.add_block_count(SHAPE.layers)
    writer.add_context_length(SHAPE.max_positions)
    writer.add_embedding_length(SHAPE.hidden)
    writer.add_feed_forward_length(SHAPE.neurons)
    writer.add_head_count(SHAPE.heads)
    writer.add_head_count_kv(SHAPE.kv_heads)
    writer.add_rope_freq_base(SHAPE.rope_theta)
    writer.add_layer_norm_rms_eps(SHAPE.rms_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary())
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(vocabulary()) - len(SPECIAL)))
    writer.add_token_merges(list(MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, weight in weights.items():
        stored = weight
        if ".q_proj." in name:
            stored = permute(weight, SHAPE.heads)
        elif ".k_proj." in name:
            stored = permute(weight, SHAPE.kv_heads)
        if quantized and weight.ndim == 2:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name(name), quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_snapshot(folder: Path, weights: dict[str, FloatArray]) -> None:
    """Writes the dense model as a snapshot of a hub repository."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    ArraySource(weights).write_tokenizer(folder)
    stored = {name: torch.from_numpy(weight).to(torch.bfloat16) for name, weight in weights.items()}
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "llama", "num_attention_heads": SHAPE.heads, "hidden_size": SHAPE.hidden,
        "num_hidden_layers": SHAPE.layers, "intermediate_size": SHAPE.neurons, "num_key_value_heads": SHAPE.kv_heads,
        "vocab_size": SHAPE.vocab, "max_position_embeddings": SHAPE.max_positions, "rope_theta": SHAPE.rope_theta,
        "rms_norm_eps": SHAPE.rms_eps, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
