"""Quantized checkpoints: which stored tensors make up an expert's parameter, and how to dequantize it.

transformers loads such a checkpoint with converters whose first operation dequantizes. That operation is removed; the
rest of the converter, a selection of rows, runs on addresses, once for each kind of stored tensor (weights, scales). On
use, the operation dequantizes one expert's tensors. A conversion that separates rows from their scales is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

from finemoe.checkpoint.expert_index import Addresses, address_rows
from finemoe.checkpoint.headers import TensorHeader
from finemoe.checkpoint.label_conversion import Conversion, convert_labels
from finemoe.errors import CheckpointError, UnsupportedModelError

DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
_UNUSED = "activation_scale"  # of activations, not of weights


@dataclass(frozen=True, eq=False)
class StoredPiece:
    """One kind of stored tensor of a quantized parameter (weights or scales), for all experts of a layer."""

    role: str  # the last part of its tensors' names
    dtype: torch.dtype
    stored: Addresses


@dataclass(frozen=True, eq=False)
class QuantizedSource:
    """Where the stored tensors of a quantized parameter are, and how to dequantize them.

    `transposed`, `parts` and `axis` are as in `QuantizedParameter`.
    """

    pieces: tuple[StoredPiece, ...]
    dequantize: LoadDequantization
    transposed: bool
    parts: int
    axis: int


class LoadDequantization:
    """transformers' dequantization, run on one expert.

    Args:
        operation: of the converter.
        sources: source patterns of the pieces, in their order.
        name: of the parameter.
    """

    def __init__(self, operation: Any, sources: Sequence[str], name: str) -> None:
        self._operation = operation
        self._sources = tuple(sources)
        self._name = name
        self._targets: dict[torch.dtype, nn.Module] = {}

    @property
    def method(self) -> str:
        """Transformers' name of the quantization method."""
        quant_method = self._operation.hf_quantizer.quantization_config.quant_method
        return str(getattr(quant_method, "value", quant_method))

    def __call__(self, pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The dequantized weights, in the checkpoint's layout: a new tensor."""
        target = self._targets.get(dtype)
        if target is None:  # the operation asks the parameter that it fills for its dtype
            target = self._targets[dtype] = nn.Module()
            target.register_parameter(self._name, nn.Parameter(torch.empty(0, dtype=dtype, device="meta")))
        stored = {source: [piece[None]] for source, piece in zip(self._sources, pieces, strict=True)}
        (value,) = self._operation.convert(stored, full_layer_name=self._name, model=target).values()
        restored: Tensor = (value[0] if isinstance(value, list) else value)[0]
        return restored.detach()


def dequantization(conversion: Conversion) -> Any:
    """The dequantizing operation of a converter; `None` if it has none."""
    operations = getattr(conversion.transform, "operations", None) or [None]
    return operations[0] if getattr(operations[0], "hf_quantizer", None) is not None else None


def roles_of(conversion: Conversion) -> dict[str, list[tuple[str, str]]]:
    """The sources of a conversion by role (the last part of their names), in the converter's order."""
    roles: dict[str, list[tuple[str, str]]] = {}
    for pattern in conversion.transform.source_patterns:
        role = _role(pattern)
        if role != _UNUSED and (found := [source for source in conversion.sources if source[1] == pattern]):
            roles.setdefault(role, []).extend(found)
    return roles


def without_dequantization(conversion: Conversion, sources: list[tuple[str, str]]) -> Conversion:
    """A conversion without its dequantization, for these sources."""
    transform = deepcopy(conversion.transform)
    assert isinstance(transform, WeightConverter)
    transform.operations = transform.operations[1:]
    return Conversion(transform, sources)


def locate_quantized(
    model: PreTrainedModel,
    headers: Mapping[str, TensorHeader],
    target: str,
    conversion: Conversion,
    shape: tuple[int, ...],
) -> QuantizedSource:
    """Run the conversion on the addresses of each role's tensors.

    Args:
        model: whose parameter it is.
        headers: of the checkpoint's tensors.
        target: full name of the parameter.
        conversion: that fills it.
        shape: of the parameter, `[E, ..]`.

    Raises:
        CheckpointError: tensors are missing or do not fit together.
        UnsupportedModelError: the dtype or the conversion is not supported.
    """
    roles = roles_of(conversion)
    first, *others = roles
    for role in others:
        if len(roles[role]) != len(roles[first]):
            raise CheckpointError(
                f"{target}: the checkpoint has {len(roles[first])} tensors {first}, but {len(roles[role])} {role}; "
                "is it complete?"
            )
    tracer = _ConversionTracer(model, headers, target, conversion, roles, shape[0])
    pieces = tuple(tracer.piece(role) for role in roles)
    for role in others:
        tracer.refuse_separated_scales(role)
    operation = LoadDequantization(
        dequantization(conversion), [sources[0][1] for sources in roles.values()], target.rpartition(".")[2]
    )
    transposed = pieces[0].stored.transposed
    parts, axis = _try_dequantize(target, operation, pieces, shape[:0:-1] if transposed else shape[1:])
    return QuantizedSource(pieces, operation, transposed, parts, axis)


class _ConversionTracer:
    """Runs the conversion of one quantized parameter on labels of its stored tensors."""

    def __init__(
        self,
        model: PreTrainedModel,
        headers: Mapping[str, TensorHeader],
        target: str,
        conversion: Conversion,
        roles: Mapping[str, list[tuple[str, str]]],
        experts: int,
    ) -> None:
        self._model = model
        self._target = target
        self._conversion = conversion
        self._experts = experts
        self._main = next(iter(roles.values()))
        self._headers = {role: [headers[key] for key, _ in sources] for role, sources in roles.items()}

    def piece(self, role: str) -> StoredPiece:
        """Where the rows of `role` are, for every expert."""
        headers = self._headers[role]
        if len(dtypes := {header.dtype for header in headers}) > 1:
            raise CheckpointError(f"{self._target}: its {role} are stored as {' and '.join(sorted(dtypes))}")
        if headers[0].dtype not in DTYPES:
            raise UnsupportedModelError(f"{self._target}: its {role} are stored as {headers[0].dtype}")
        dtype = DTYPES[headers[0].dtype]
        if self._stacked:
            (header,) = headers
            shape = header.shape[1:]
            flat = address_rows(header.file, header.offset_bytes, (self._experts, prod(shape)), dtype.itemsize)
            return StoredPiece(role, dtype, Addresses(flat, prod(shape) * dtype.itemsize, shape, transposed=False))
        shapes = [_matrix(header) for header in headers]
        columns = shapes[0][-1]
        if any(shape[-1] != columns for shape in shapes):
            raise UnsupportedModelError(f"{self._target}: its {role} differ in row length")
        labels = [
            address_rows(header.file, header.offset_bytes, shape, dtype.itemsize)
            for header, shape in zip(headers, shapes, strict=True)
        ]
        found = self._convert(labels)
        transposed = found.shape[1] == 1 < found.shape[2]
        rows = found.reshape(self._experts, -1)
        return StoredPiece(role, dtype, Addresses(rows, columns * dtype.itemsize, (rows.shape[1], columns), transposed))

    def refuse_separated_scales(self, role: str) -> None:
        """Raises `UnsupportedModelError` if rows are separated from their scales: blocks are split or interleaved."""
        if self._stacked:
            return
        weights, scales = [], []
        for number, (header, scale) in enumerate(zip(self._main_headers, self._headers[role], strict=True)):
            shape, grid = _matrix(header), _matrix(scale)
            block, rest = divmod(shape[-2], grid[-2])
            if rest or shape[:-2] != grid[:-2]:
                raise UnsupportedModelError(
                    f"{self._target}: {list(shape)} weights do not divide into {list(grid)} blocks"
                )
            rows, blocks = prod(shape[:-1]), prod(grid[:-1])
            weights.append(((torch.arange(rows) // block) + (number << 32)).reshape(*shape[:-1], 1))
            scales.append((torch.arange(blocks) + (number << 32)).reshape(*grid[:-1], 1))
        got = self._convert(weights).reshape(self._experts, -1)
        grid_rows = self._convert(scales).reshape(self._experts, -1)
        if not torch.equal(got, grid_rows.repeat_interleave(got.shape[1] // grid_rows.shape[1], dim=1)):
            raise UnsupportedModelError(f"{self._target}: its rows are put together in another order than their {role}")

    @property
    def _main_headers(self) -> list[TensorHeader]:
        return next(iter(self._headers.values()))

    @property
    def _stacked(self) -> bool:
        """Whether the checkpoint has one tensor for all experts, and nothing rearranges its rows."""
        transform = self._conversion.transform
        stacked = isinstance(transform, WeightConverter) and len(transform.operations) == 1
        if stacked and any(len(h) != 1 or h[0].shape[:1] != (self._experts,) for h in self._headers.values()):
            raise CheckpointError(f"{self._target}: the checkpoint's tensors do not have {self._experts} experts")
        return stacked

    def _convert(self, labels: list[Tensor]) -> Tensor:
        """Convert labels `[.., R, 1]` of one role's tensors to `[E, R, 1]` or `[E, 1, R]`.

        Operations expect the names of the quantized weights, so scales are converted under these names too.
        """
        part = without_dequantization(self._conversion, self._main)
        converted = convert_labels(self._model, self._target, part, labels, by_rows=True)
        found = converted.get(self._target)
        if len(converted) > 1 or found is None or found.dim() != 3 or 1 not in found.shape[1:]:
            raise UnsupportedModelError(
                f"{self._target}: transformers converts these quantized experts in a way that finemoe does not support"
            )
        if found.shape[0] != self._experts:
            raise CheckpointError(
                f"{self._target}: the checkpoint has {found.shape[0]} experts where the model expects "
                f"{self._experts}; is it complete?"
            )
        return found


def _role(pattern: str) -> str:
    return pattern.removesuffix("$").rpartition(".")[2]


def _matrix(header: TensorHeader) -> tuple[int, ...]:
    """A stored tensor's shape; a single scale for a matrix counts as a grid of one block."""
    return header.shape if len(header.shape) > 1 else (1, prod(header.shape))


def _try_dequantize(
    target: str, operation: LoadDequantization, pieces: Sequence[StoredPiece], expected: tuple[int, ...]
) -> tuple[int, int]:
    """Dequantize zeros in the shape of the first rows, to check the shapes.

    Returns:
        Into how many parts the pieces can be split along their first dimension, and along which axis the parts'
        results are concatenated.

    Raises:
        CheckpointError: the dequantized shape is not the expected one.
        UnsupportedModelError: transformers can't dequantize these tensors.
    """
    parts = gcd(*(piece.stored.stored_shape[0] for piece in pieces))
    shapes = []
    for count in (1, min(2, parts)):
        zeros = [
            torch.zeros((rows // parts * count, *rest), dtype=piece.dtype)
            for piece in pieces
            for rows, *rest in [piece.stored.stored_shape]
        ]
        try:
            shapes.append(tuple(operation(zeros, torch.bfloat16).shape))
        except (AssertionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UnsupportedModelError(f"{target}: transformers can't dequantize its weights ({reason})") from error
    one, two = shapes
    axis = next((i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), 0)
    full = tuple(size * parts if i == axis else size for i, size in enumerate(one))
    if full != expected:
        raise CheckpointError(f"{target}: its tensors dequantize to {list(full)}, the model expects {list(expected)}")
    return parts, axis
