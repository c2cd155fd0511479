"""Write a student as the bundle that `finemoe.model.reference` ships."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from student import Student
from torch import Tensor


def half(tensor: Tensor) -> np.ndarray:
    """float16, checked to be finite."""
    array = tensor.detach().numpy().astype(np.float16)
    if not np.isfinite(array).all():
        raise ValueError("a bundle tensor does not fit float16")
    return array


def export_bundle(path: Path, student: Student, metadata: Mapping[str, str]) -> int:
    """Write the bundle to `path`, atomically; its size in bytes."""
    layers, experts, _ = student.mask.shape
    mask = student.mask.numpy()
    scales = student.parts["scales"].detach()
    packed = scales[student.mask].view(layers, experts, -1)
    tensors = {
        "router": half(student.parts["router"]),
        "neurons": np.packbits(mask, axis=-1, bitorder="little"),
        "scales": half(packed),
        "input_norm": half(student.dense.input_norm * student.parts["input_norm"]),
        "post_norm": half(student.dense.post_norm * student.parts["post_norm"]),
        "final_norm": half(student.dense.final_norm * student.parts["final_norm"]),
    }
    for name, tensor in student.delta.items():
        tensors[f"delta.{name}"] = half(tensor)
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata=dict(metadata))
    part.chmod(0o644)
    part.replace(path)
    return path.stat().st_size
