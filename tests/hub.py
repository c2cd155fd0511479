"""A model on the hub, as far as reading its headers goes: its published config, and the tensors that follow from it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.utils._safetensors import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

QWEN3_30B_A3B: dict[str, Any] = {  # Qwen/Qwen3-30B-A3B's config.json
    "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1, "dtype": "bfloat16", "head_dim": 128,
    "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960, "mlp_only_layers": [],
    "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True, "num_attention_heads": 32,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "tie_word_embeddings": False, "vocab_size": 151936,
}  # fmt: skip


def publish(name: str, config: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the hub client answer for `name` with this config and the headers of its weights; there are no weights."""
    (folder / "config.json").write_text(json.dumps(config))
    loaded = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loaded)
    tensors, begin = {}, 0
    for key, tensor in sorted(revert_weight_conversion(model, model.state_dict()).items()):
        end = begin + 2 * math.prod(tensor.shape)
        tensors[key] = TensorInfo("BF16", list(tensor.shape), (begin, end))
        begin = end
    file = SafetensorsFileMetadata({}, tensors)
    metadata = SafetensorsRepoMetadata(None, sharded=False, weight_map={}, files_metadata={"model.safetensors": file})

    def download(repo: str, filename: str, **_: Any) -> str:
        assert (repo, filename) == (name, "config.json")
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda repo, **_: {name: metadata}[repo])
