"""Tiny quantized checkpoints, and the dequantized models that transformers loads from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import FineGrainedFP8Config, GptOssConfig, GptOssForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Quantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from tests.families.factory import _spread
from tests.tiny import aligned, edited, write

BLOCK = 8  # rows and columns; 128 in the releases
Tensors = dict[str, Tensor]
_KEPT = ("embed", "lm_head", "norm", "gate.weight", "conv")  # in the releases too


def restored(folder: Path, dtype: str = "auto") -> Any:
    """The complete model, dequantized by transformers on load."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.quantization_config = config.quantization_config | {"dequantize": True}
    kind = getattr(transformers, config.architectures[0])
    return aligned(kind.from_pretrained(folder, config=config, experts_implementation="eager", dtype=dtype))


def fp8(folder: Path, family: str, *, keep: Callable[[str], bool] = lambda _: False) -> Path:
    """A tiny model of `family` in blocks of float8, dense layers included, except those that `keep` selects."""
    plain = write(folder / "plain", family, "bfloat16")
    settings = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}

    def quantize(tensors: Tensors) -> None:
        operation: Any = Fp8Quantize(
            FineGrainedFP8HfQuantizer(FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK)), pre_quantized=True)
        )
        for name in list(tensors):
            if name.endswith(".weight") and not any(part in name for part in _KEPT) and not keep(name):
                tensors.update(operation.convert({name: tensors[name]}))

    return _declared(edited(plain, folder / "quantized", quantize), settings)


def mxfp4(folder: Path, *, experts: int = 8) -> Path:
    """A tiny gpt-oss whose experts are stored as blocks of 32 four-bit floats with a shared exponent."""
    config = GptOssConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=experts,
        num_experts_per_tok=3,
        max_position_embeddings=256,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model: Any = GptOssForCausalLM(config)
    _spread(model)
    model.to(torch.bfloat16).save_pretrained(folder / "plain")

    def quantize(tensors: Tensors) -> None:
        draw = torch.Generator().manual_seed(1)
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            count, inputs, outputs = tensors.pop(name).shape
            shape = (count, outputs, inputs // 32)
            tensors[f"{name}_blocks"] = torch.randint(256, (*shape, 16), generator=draw, dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(121, 126, shape, generator=draw, dtype=torch.uint8)

    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    return _declared(edited(folder / "plain", folder / "quantized", quantize), settings)


def _declared(folder: Path, settings: dict[str, Any]) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder
