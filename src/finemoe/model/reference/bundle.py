"""The shipped bundle: the parameters that turn the dense model into a mixture.

Shapes: `L` layers, `E` experts, `K` experts per token, `D` hidden size, `F` dense neurons, `M` neurons of an expert.

An expert is a subset of `M` of its layer's `F` dense neurons with a scale for each. Every tensor is float16
except the bitmask; names and shapes:

    router         [L, E, D]   rows of the gate
    neurons        [L, E, F/8] uint8, little-endian bits: bit f is set if the expert has neuron f
    scales         [L, E, M]   factors on the down projection's columns, in ascending neuron order
    input_norm     [L, D]      replace the dense model's norms
    post_norm      [L, D]
    final_norm     [D]
    delta.<p>.up   [L, out, R] optional: up @ down is added to attention projection p (q, k, v, o)
    delta.<p>.down [L, R, in]

The header's metadata holds text fields: version, seed, experts, top_k, expert_neurons, source_package,
source_sha256, and a line on how the bundle was made.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finemoe.errors import ReferenceModelError
from finemoe.model.reference.dense import DenseShape, FloatArray

ATTENTION = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle; its accessors return float32 arrays."""

    tensors: Mapping[str, NDArray[np.generic]]
    metadata: Mapping[str, str]
    sha256: str

    @property
    def version(self) -> str:
        """The bundle's version."""
        return self.metadata["version"]

    @property
    def top_k(self) -> int:
        """Experts active per token, K."""
        return int(self.metadata["top_k"])

    @property
    def experts(self) -> int:
        """Experts of a layer, E."""
        return int(self.tensors["router"].shape[1])

    @property
    def expert_neurons(self) -> int:
        """Neurons of an expert, M."""
        return int(self.tensors["scales"].shape[2])

    def array(self, name: str, layer: int | None = None) -> FloatArray:
        """The tensor `name`, or its part for one layer, as float32."""
        tensor = self.tensors[name]
        return np.asarray(tensor if layer is None else tensor[layer], dtype=np.float32)

    def neurons(self, layer: int) -> NDArray[np.intp]:
        """Indices of the dense neurons of each expert, ascending, `[E, M]`."""
        bits = np.unpackbits(np.asarray(self.tensors["neurons"][layer], dtype=np.uint8), axis=-1, bitorder="little")
        return np.stack([np.flatnonzero(row) for row in bits])

    def delta(self, projection: str, layer: int) -> FloatArray | None:
        """The low-rank change `[out, in]` of attention projection `q`, `k`, `v` or `o`; `None` if there is none."""
        if f"delta.{projection}.up" not in self.tensors:
            return None
        up, down = self.array(f"delta.{projection}.up", layer), self.array(f"delta.{projection}.down", layer)
        return np.asarray(up @ down, dtype=np.float32)

    def check_fits(self, shape: DenseShape) -> None:
        """Raises `ReferenceModelError` unless the bundle belongs to a dense model of this shape."""
        layers, _experts, hidden = self.tensors["router"].shape
        found = (layers, hidden, self.tensors["neurons"].shape[2] * 8)
        if found != (shape.layers, shape.hidden, shape.neurons):
            raise ReferenceModelError(
                f"the bundle is for a dense model of (layers, hidden, neurons) {found}, the source has "
                f"{(shape.layers, shape.hidden, shape.neurons)}; reinstall finemoe or choose another source"
            )


def load_bundle(path: Path | None = None) -> Bundle:
    """Loads the bundle at `path`, by default the one shipped in this package.

    Raises:
        ReferenceModelError: it is missing, damaged or incomplete.
    """
    from safetensors import SafetensorError, safe_open

    if path is None:
        path = Path(str(resources.files("finemoe.model.reference") / "bundle.safetensors"))
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        with safe_open(path, framework="numpy") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise ReferenceModelError(f"the bundle {path.name} cannot be read ({error}); reinstall finemoe") from error
    needed = {"router", "neurons", "scales", "input_norm", "post_norm", "final_norm"}
    if missing := sorted(needed - tensors.keys()) + sorted({"version", "top_k"} - metadata.keys()):
        raise ReferenceModelError(f"the bundle {path.name} lacks {', '.join(missing)}; reinstall finemoe")
    return Bundle(tensors, metadata, digest)
