"""Tiny checkpoints on disk, and the reference answers of transformers' eager implementation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.families.factory import build

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS = "model.safetensors"
Make = Callable[..., Path]


def write(folder: Path, family: str, dtype: str = "float32", **options: Any) -> Path:
    """Saves a tiny model with random weights; `options` go to `save_pretrained`."""
    build(family, DTYPES[dtype]).save_pretrained(folder, **options)
    return folder


def eager(folder: Path, dtype: str = "auto") -> Any:
    """The complete model in memory, with transformers' eager experts: the reference of every comparison."""
    config = transformers.AutoConfig.from_pretrained(folder)
    kind = getattr(transformers, config.architectures[0])
    return aligned(kind.from_pretrained(folder, experts_implementation="eager", dtype=dtype))


def aligned(model: Any) -> Any:
    """Copies weights that lie unaligned in a memory-mapped file to aligned memory.

    On some CPUs (AMD's) MKL's order of summation depends on the alignment of a float32 matrix.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.data_ptr() % 64:
            tensor.data = tensor.data.clone()
    return model


def experts_modules(model: Any) -> list[Any]:
    """The experts modules of a model, in order, offloaded or not."""
    return [m for m in model.modules() if hasattr(m, "is_transposed") and hasattr(type(m).forward, "__wrapped__")]


def prompt(batch: int = 1, tokens: int = 12) -> dict[str, torch.Tensor]:
    """Token ids `[batch, tokens]`; all but the first are padded on the left."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 100, (batch, tokens), generator=draw)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 2 * row] = 0
        ids[row, : 2 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def answer(model: Any, *, batch: int = 1, new_tokens: int = 6, **options: Any) -> torch.Tensor:
    """Output of `generate`: greedy unless `options` say otherwise, without early stopping."""
    chosen = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new_tokens} | options
    output: torch.Tensor = model.generate(**prompt(batch), **chosen)
    return output


def logits(model: Any, *, batch: int = 1) -> torch.Tensor:
    """Logits of one forward pass over `prompt`."""
    with torch.no_grad():
        output: torch.Tensor = model(**prompt(batch)).logits
    return output


def edited(folder: Path, into: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a one-file checkpoint whose tensors `edit` changes in place."""
    shutil.copytree(folder, into, dirs_exist_ok=True)
    tensors = load_file(into / WEIGHTS)
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, into / WEIGHTS, {"format": "pt"})
    return into


def configured(folder: Path, into: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with other values in its config.json."""
    shutil.copytree(folder, into, dirs_exist_ok=True)
    config = json.loads((into / "config.json").read_text())
    (into / "config.json").write_text(json.dumps(config | changes))
    return into
