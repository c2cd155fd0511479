"""Checkpoint layouts that are published but not written by `save_pretrained`."""

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.families.examine import SHARD, compare
from tests.families.factory import FAMILIES, build
from tests.families.shrink import LAYERS

Tensors = dict[str, Tensor]


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Writes all tensors of a checkpoint, changed, into one file."""
    tensors: Tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in change(tensors).items()}, folder / "model.safetensors")


def saved(family: str, dtype: torch.dtype, folder: Path, **options: Any) -> type[PreTrainedModel]:
    """Saves a tiny model to `folder`, in several files."""
    if family not in FAMILIES:
        pytest.skip(f"{family} came after transformers {transformers.__version__}")
    model = build(family, dtype)
    model.save_pretrained(folder, max_shard_size=SHARD, **options)
    return type(model)


@pytest.mark.parametrize(
    "family", ["deepseek_v3", "ernie4_5_vl_moe", "inkling2", "mixtral", "nemotron_h", "qwen3_5_moe"]
)
def test_experts_stacked_under_their_own_names(family: str, tmp_path: Path) -> None:
    kind = saved(family, torch.bfloat16, tmp_path, save_original_format=False)
    assert compare(kind, tmp_path, torch.bfloat16).status == "exact"


@pytest.mark.parametrize(
    ("stored", "computed"), [*permutations((torch.float32, torch.bfloat16, torch.float16), 2)], ids=str
)
@pytest.mark.parametrize("family", ["gpt_oss", "inkling2", "mixtral", "nemotron_h"])
def test_checkpoint_stored_in_another_type(
    family: str, stored: torch.dtype, computed: torch.dtype, tmp_path: Path
) -> None:
    kind = saved(family, stored, tmp_path)
    verdict = compare(kind, tmp_path, computed)
    assert verdict.status == "exact", verdict.why


def test_transposed_experts_are_exact_or_refused(tmp_path: Path) -> None:
    def transpose(tensors: Tensors) -> Tensors:
        return {name: t.transpose(1, 2) if ".mlp.experts." in name else t for name, t in tensors.items()}

    kind = saved("qwen3_vl_moe", torch.bfloat16, tmp_path)
    rewrite(tmp_path, transpose)
    verdict = compare(kind, tmp_path, torch.bfloat16)
    assert verdict.status in ("exact", "refused"), verdict.why


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "exaone_moe"])
def test_layers_that_only_predict_further_tokens_are_left_out(family: str, tmp_path: Path) -> None:
    def add_layer(tensors: Tensors) -> Tensors:
        last, extra = f"model.layers.{LAYERS - 1}.", f"model.layers.{LAYERS}."
        return tensors | {name.replace(last, extra): t + 1 for name, t in tensors.items() if last in name}

    kind = saved(family, torch.bfloat16, tmp_path)
    rewrite(tmp_path, add_layer)
    verdict = compare(kind, tmp_path, torch.bfloat16)
    assert verdict.status == "exact", verdict.why


def test_experts_in_one_file(tmp_path: Path) -> None:
    kind = saved("qwen3_moe", torch.bfloat16, tmp_path)
    rewrite(tmp_path, lambda tensors: dict(reversed(tensors.items())))
    assert compare(kind, tmp_path, torch.bfloat16).status == "exact"
