"""Makes any configuration tiny by the names of its fields.

`SIZES` has the small value of every field name that sets a size, in any family; other values that a family needs are in
`tests.families.overrides`. A field whose default is `None` ("not used") keeps it, except the sizes of experts, which
some families leave open. Lists with one entry per layer are set to `None`, so that the configuration derives them for
the small number of layers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

LAYERS = 4
EXPERTS = 8
ACTIVE = 3
VOCABULARY = 128
SPECIAL = 100  # ids from here on are special tokens; prompts stay below

EXPERT_SIZES: Mapping[str, int] = {
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), EXPERTS),
    **dict.fromkeys(
        ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_k", "moe_top_k", "moe_topk"), ACTIVE
    ),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size"), 24),
}

SIZES: Mapping[str, int | float] = {
    **EXPERT_SIZES,
    # the model as a whole
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "d_model", "text_hidden_size", "out_hidden_size", "projector_hidden_size"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), LAYERS),
    **dict.fromkeys(("max_position_embeddings", "max_seq_len", "model_max_length"), 256),
    "initializer_range": 0.1,
    # feed-forward blocks outside the routed experts
    **dict.fromkeys(
        (
            "intermediate_size",
            "intermediate_size_mlp",
            "dense_intermediate_size",
            "shared_expert_intermediate_size",
            "shared_experts_intermediate_size",
            "moe_shared_expert_intermediate_size",
            "shared_intermediate_size",
            "share_expert_dim",
            "ffn_hidden_size",
            "projection_intermediate_size",
            "d_ff",
            "encoder_ffn_dim",
            "decoder_ffn_dim",
            "mlp_dim",
        ),
        48,
    ),
    "router_hidden_size": 32,
    "moe_hidden_size": 40,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group"), 1),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"), 1),
    # attention
    **dict.fromkeys(
        (
            "num_attention_heads",
            "num_sliding_attention_heads",
            "swa_num_attention_heads",
            "n_heads",
            "num_heads",
            "encoder_attention_heads",
            "decoder_attention_heads",
        ),
        4,
    ),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "kv_n_heads"), 2),
    **dict.fromkeys(("head_dim", "swa_head_dim", "kv_channels", "qk_nope_head_dim", "v_head_dim", "d_kv"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "o_lora_rank"), 32),
    **dict.fromkeys(("index_n_heads", "index_topk_blocks"), 2),
    **dict.fromkeys(("index_head_dim", "index_topk"), 16),
    **dict.fromkeys(("index_block_size", "index_kpool"), 4),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size"), 8),
    **dict.fromkeys(("d_rel", "gated_norm_rank", "hc_lowrank"), 8),
    **dict.fromkeys(("rel_extent", "max_window_layers"), 32),
    # linear attention and state spaces
    **dict.fromkeys(("linear_num_heads", "linear_num_value_heads", "mamba_n_heads", "mamba_num_heads"), 4),
    "linear_num_key_heads": 2,
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "mamba_dt_rank"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "block_size"), 8),
    "n_groups": 1,
    # images and sound: built, but not used
    **dict.fromkeys(("depth", "num_code_groups"), 2),
    "patch_size": 14,
    "image_size": 28,
    **dict.fromkeys(
        ("output_dim", "vision_output_dim", "projector_input_dim", "projector_output_dim", "adapter_out_dim"), 64
    ),
    **dict.fromkeys(("decoder_dim", "downsample_hidden_size", "projection_hidden_dim"), 32),
}

PER_LAYER = frozenset(
    {
        "indexer_types",
        "layer_rope_theta",
        "layer_types",
        "layers_block_type",
        "mlp_layer_types",
        "mlp_only_layers",
        "moe_layers",
        "no_rope_layers",
        "num_attention_heads_per_layer",
        "kv_source_layers",
    }
)


def tiny_config(config_class: type[PreTrainedConfig], overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """A small configuration. Dotted keys of `overrides` are for sub-configurations (`text_config.hidden_size`)."""
    return config_class(**_tiny(config_class(), overrides))


def _attends_to_latents(default: PreTrainedConfig) -> bool:
    """Whether it has multi-head latent attention, which needs equal numbers of query and key heads."""
    return "kv_lora_rank" in {field.name for field in dataclasses.fields(default)}


def _tiny(default: PreTrainedConfig, overrides: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    special = SPECIAL
    default.allow_global_per_layer_attribute_access = True  # otherwise a field that differs between layers raises
    for field in dataclasses.fields(default):
        name, value = field.name, getattr(default, field.name, None)
        if isinstance(value, PreTrainedConfig):
            inner = {key.partition(".")[2]: item for key, item in overrides.items() if key.startswith(f"{name}.")}
            values[name] = {"model_type": value.model_type, **_tiny(value, inner)}
        elif name in PER_LAYER:
            values[name] = None
        elif name in SIZES and (value is not None or name in EXPERT_SIZES):
            values[name] = SIZES[name]
        elif name.endswith(("_token_id", "_token_index")) and value is not None:
            special += 1
            values[name] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}.get(name, special)
    if _attends_to_latents(default):
        values["num_key_value_heads"] = SIZES["num_attention_heads"]
    return values | {key: value for key, value in overrides.items() if "." not in key}
