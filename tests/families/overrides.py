"""Config values that single families need besides the generic ones in `shrink`."""

from collections.abc import Mapping
from typing import Any

from tests.families.shrink import LAYERS

GEMMA = {"enable_moe_block": True, "global_head_dim": 16, "hidden_size_per_layer_input": 0}
QSA = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
DOTS3 = {
    "head_dim": 24,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "swa_q_lora_rank": 32,
    "swa_kv_lora_rank": 32,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
ALTERNATING = ["linear_attention", "full_attention"] * (LAYERS // 2)
SPARSE_AFTER_ONE = ["dense"] + ["sparse"] * (LAYERS - 1)


def within(part: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` for the sub-configuration `part`."""
    return {f"{part}.{name}": value for name, value in values.items()}


OVERRIDES: Mapping[str, Mapping[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 3},
    "beam": {"mlp_layer_types": SPARSE_AFTER_ONE},
    "dbrx": {"attn_config.rope_theta": 10_000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": SPARSE_AFTER_ONE,
        "vision_config.sam_config.output_channels": 32,
        "vision_config.sam_config.downsample_channels": [32, 64],
    },
    "diffusion_gemma": {"canvas_length": 8, "text_config.global_head_dim": 16},
    "doge": {"is_moe": True, "num_experts": 16},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {
        **within("text_config", DOTS3),
        "vision_config.adapter_in_dim": 64,
        "audio_config.adapter_input_size": 64,
        "vision_config.mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
        "vision_config.per_layer_config": {
            2: {"num_local_experts": 4, "num_experts_per_tok": 2},
            3: {"num_local_experts": 8, "num_experts_per_tok": 2},
        },
    },
    "dots3_note_text": DOTS3,
    "ernie4_5_vl_moe": {
        "text_config.moe_intermediate_size": [24, 16],
        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
    },
    "gemma4": within("text_config", GEMMA),
    "gemma4_text": GEMMA,
    "glm5_next": within(
        "text_config",
        {"qk_rope_head_dim": 0, "mlp_layer_types": SPARSE_AFTER_ONE},
    ),
    "glm4v_moe": {
        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    },
    "granitemoehybrid": {"layer_types": ALTERNATING, "mamba_d_head": 32},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0},
    "kimi_linear": {"layer_types": ALTERNATING},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 4, "head_dim": 8},
    "muse_spark": {"audio_config.hidden_sizes": [16, 16, 32, 64]},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp", "moe"],
        "moe_latent_size": 40,
    },
    "qwen4_exp": within("text_config", QSA),
    "qwen4_exp_text": QSA,
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 101, "vision_end_token_id": 102},
    "step3p7": {"text_config.mlp_layer_types": SPARSE_AFTER_ONE, "text_config.sliding_window": 8},
    "unlimited_ocr": {
        "vision_config.sam_config.output_channels": 32,
        "vision_config.sam_config.downsample_channels": [32, 64],
    },
    "zaya": {"num_experts_per_tok": 1},
}
