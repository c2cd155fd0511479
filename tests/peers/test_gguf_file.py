"""A checkpoint as GGUF: names, shapes and values as llama.cpp lays them out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.chat_model import make_chat_model
from tests.peers.conftest import Script
from tests.tiny import Make


def values(tensor: Any) -> torch.Tensor:
    """A tensor of a GGUF file, in float32."""
    raw = torch.from_numpy(np.array(tensor.data))
    return raw if raw.dtype == torch.float32 else raw.view(torch.bfloat16).float()


def test_every_weight_is_written_once(script: Script, tmp_path: Path) -> None:
    folder = make_chat_model(tmp_path / "model")
    script("gguf_file").write_gguf(folder, tmp_path / "model.gguf")
    stored = load_file(folder / "model.safetensors")
    tensors = {tensor.name: values(tensor) for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert sum(t.numel() for t in tensors.values()) == sum(t.numel() for t in stored.values())
    experts = tensors["blk.1.ffn_down_exps.weight"]
    assert torch.equal(experts[5], stored["model.layers.1.block_sparse_moe.experts.5.w2.weight"].float())
    assert torch.equal(tensors["output.weight"], stored["lm_head.weight"].float())
    query, own = tensors["blk.0.attn_q.weight"], stored["model.layers.0.self_attn.q_proj.weight"].float()
    assert torch.equal(query[0], own[0])
    assert torch.equal(query[1], own[8])  # of a head's 16 rows, the ninth is rotated with the first
    assert not list(tmp_path.glob("*.partial"))


def test_qwen3_moe_keeps_its_row_order(script: Script, tiny: Make, tmp_path: Path) -> None:
    folder = tiny("qwen3_moe", dtype="bfloat16")
    script("gguf_file").write_gguf(folder, tmp_path / "model.gguf")
    stored = load_file(folder / "model.safetensors")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors = {tensor.name: values(tensor) for tensor in reader.tensors}
    assert torch.equal(tensors["blk.0.attn_q.weight"], stored["model.layers.0.self_attn.q_proj.weight"].float())
    assert reader.fields["general.architecture"].contents() == "qwen3moe"


def test_an_unsupported_family_is_refused(script: Script, tiny: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no GGUF of a olmoe model"):
        script("gguf_file").write_gguf(tiny("olmoe"), tmp_path / "model.gguf")
