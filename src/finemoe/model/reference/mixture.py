"""Computes the tensors and the configuration of the Mixtral checkpoint from dense layers and the bundle.

Pure functions; shapes as in `bundle`.
"""

from collections.abc import Iterator

from finemoe.model.reference.bundle import ATTENTION, Bundle
from finemoe.model.reference.dense import DenseShape, DenseSource, FloatArray, layer_tensors, read_checked

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"


def mixture_layer(source: DenseSource, bundle: Bundle, layer: int) -> Iterator[tuple[str, FloatArray]]:
    """Names and float32 weights of one mixture layer, in the layout of Mixtral checkpoints.

    Experts' `w1` and `w3` are `[M, D]`, `w2` is `[D, M]`; the gate is `[E, D]`.
    """
    sizes = layer_tensors(source.shape, layer)
    prefix = f"model.layers.{layer}"
    for projection in ATTENTION:
        name = f"{prefix}.self_attn.{projection}_proj.weight"
        weight = read_checked(source, name, sizes[name])
        delta = bundle.delta(projection, layer)
        yield name, weight if delta is None else weight + delta
    yield f"{prefix}.input_layernorm.weight", bundle.array("input_norm", layer)
    yield f"{prefix}.post_attention_layernorm.weight", bundle.array("post_norm", layer)
    yield f"{prefix}.block_sparse_moe.gate.weight", bundle.array("router", layer)
    gate, up, down = (
        read_checked(source, name, sizes[name])
        for name in (f"{prefix}.mlp.{part}_proj.weight" for part in ("gate", "up", "down"))
    )
    scales = bundle.array("scales", layer)
    for expert, neurons in enumerate(bundle.neurons(layer)):
        stem = f"{prefix}.block_sparse_moe.experts.{expert}"
        yield f"{stem}.w1.weight", gate[neurons]
        yield f"{stem}.w3.weight", up[neurons]
        yield f"{stem}.w2.weight", down[:, neurons] * scales[expert]


def mixture_top(source: DenseSource, bundle: Bundle) -> Iterator[tuple[str, FloatArray]]:
    """Names and float32 weights outside the layers: the (tied) embedding and the final norm."""
    shape = source.shape
    yield EMBEDDING, read_checked(source, EMBEDDING, (shape.vocab, shape.hidden))
    yield FINAL_NORM, bundle.array("final_norm")


def mixture_config(shape: DenseShape, bundle: Bundle) -> dict[str, object]:
    """The `config.json` of the mixture, a `MixtralForCausalLM`."""
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "dtype": "bfloat16",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": bundle.expert_neurons,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "num_local_experts": bundle.experts,
        "num_experts_per_tok": bundle.top_k,
        "hidden_act": "silu",
        "max_position_embeddings": shape.max_positions,
        "rms_norm_eps": shape.rms_eps,
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "sliding_window": None,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "router_jitter_noise": 0.0,
        "use_cache": True,
        "bos_token_id": shape.bos,
        "eos_token_id": shape.eos,
        "pad_token_id": shape.pad,
    }


def generation_config(shape: DenseShape) -> dict[str, object]:
    """The `generation_config.json`; its repetition penalty prevents loops (see docs/reference-model.md)."""
    return {
        "bos_token_id": shape.bos,
        "eos_token_id": shape.eos,
        "pad_token_id": shape.pad,
        "repetition_penalty": 1.1,
    }


def mixture_bytes(shape: DenseShape, bundle: Bundle) -> int:
    """Size of the built weights in bfloat16, in bytes (headers and tokenizer not counted)."""
    d, experts = shape.hidden, bundle.experts
    attention = 2 * d * shape.head_dim * (shape.heads + shape.kv_heads)
    layer = attention + 2 * d + experts * d + 3 * experts * d * bundle.expert_neurons
    return 2 * (shape.vocab * d + d + shape.layers * layer)
