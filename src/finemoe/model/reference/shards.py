"""Writes a checkpoint shard by shard: one shard is in memory at a time, and an interrupted build can resume.

Shards are written under a temporary name, synced to disk, then renamed.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from finemoe.errors import ReferenceModelError
from finemoe.model.reference.bundle import Bundle
from finemoe.model.reference.dense import DenseSource, FloatArray
from finemoe.model.reference.mixture import mixture_layer, mixture_top

LAYERS_PER_SHARD = 5
INDEX = "model.safetensors.index.json"

Tensors = Iterator[tuple[str, FloatArray]]


def plan_shards(source: DenseSource, bundle: Bundle) -> dict[str, Callable[[], Tensors]]:
    """A generator function of the tensors of each shard, by file name: groups of layers, then all other tensors."""
    groups = [
        range(first, min(first + LAYERS_PER_SHARD, source.shape.layers))
        for first in range(0, source.shape.layers, LAYERS_PER_SHARD)
    ]

    def layers(group: range) -> Callable[[], Tensors]:
        def tensors() -> Tensors:
            for layer in group:
                yield from mixture_layer(source, bundle, layer)

        return tensors

    makers = [*(layers(group) for group in groups), lambda: mixture_top(source, bundle)]
    return {f"model-{n:05d}-of-{len(makers):05d}.safetensors": make for n, make in enumerate(makers, 1)}


def write_shard(path: Path, tensors: Tensors) -> None:
    """Writes `tensors` to `path` in bfloat16, atomically."""
    import torch
    from safetensors.torch import save_file

    stored = {name: torch.from_numpy(array).to(torch.bfloat16).contiguous() for name, array in tensors}
    part = path.with_suffix(".part")
    save_file(stored, part, metadata={"format": "pt"})
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)


def read_index(folder: Path, names: Mapping[str, object]) -> dict[str, object]:
    """The index of the finished shards `names` in `folder`, from their headers.

    Raises:
        ReferenceModelError: a shard can't be read.
    """
    from safetensors import SafetensorError, safe_open

    shard_of: dict[str, str] = {}
    total_bytes = 0
    for name in names:
        try:
            with safe_open(folder / name, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118 (not a dict)
                    size = file.get_slice(key).get_shape()
                    elements = 1
                    for length in size:
                        elements *= length
                    total_bytes += 2 * elements
                    shard_of[key] = name
        except (OSError, SafetensorError) as error:
            raise ReferenceModelError(f"the shard {folder / name} is damaged ({error}); delete {folder}") from error
    return {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(shard_of.items()))}


def write_index(folder: Path, index: Mapping[str, object]) -> None:
    """Writes the checkpoint's index file."""
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def is_complete(folder: Path) -> bool:
    """Whether `folder` has the checkpoint's index and every shard that it names."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return all((folder / name).exists() for name in set(index["weight_map"].values()))
