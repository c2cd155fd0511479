"""Experts that are stored quantized: which tensors make up a parameter, and transformers' own way to restore it.

transformers loads such a checkpoint by converters whose first operation dequantizes. That operation is taken off the
converter; what is left, a choice of rows, is followed on addresses for each kind of stored tensor (weights, scales) by
itself. On use, the operation runs on one expert's tensors. Where rows and their scales would part, it is refused.
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
_UNUSED = "activation_scale"  # of inputs; restoring weights does not need it


@dataclass(frozen=True, eq=False)
class StoredPiece:
    """One kind of stored tensor that a quantized parameter is made of, for all experts of a layer."""

    role: str  # the last part of its tensors' names
    dtype: torch.dtype
    stored: Addresses


@dataclass(frozen=True, eq=False)
class Located:
    """Where a quantized parameter's pieces are, and what restores it from them."""

    pieces: tuple[StoredPiece, ...]
    dequantize: LoadOperation
    transposed: bool
    parts: int
    axis: int


class LoadOperation:
    """transformers' dequantization, run on one expert.

    Args:
        operation: the converter's.
        sources: what it calls the pieces, in their order.
        name: of the parameter.
    """

    def __init__(self, operation: Any, sources: Sequence[str], name: str) -> None:
        self._operation = operation
        self._sources = tuple(sources)
        self._name = name
        self._targets: dict[torch.dtype, nn.Module] = {}

    @property
    def form(self) -> str:
        """What transformers calls this quantization."""
        method = self._operation.hf_quantizer.quantization_config.quant_method
        return str(getattr(method, "value", method))

    def __call__(self, pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """The weights that the pieces stand for, as the checkpoint lays them out: a new tensor."""
        target = self._targets.get(dtype)
        if target is None:  # the operation asks the parameter that it fills for its dtype
            target = self._targets[dtype] = nn.Module()
            target.register_parameter(self._name, nn.Parameter(torch.empty(0, dtype=dtype, device="meta")))
        stored = {source: [piece[None]] for source, piece in zip(self._sources, pieces, strict=True)}
        (value,) = self._operation.convert(stored, full_layer_name=self._name, model=target).values()
        restored: Tensor = (value[0] if isinstance(value, list) else value)[0]
        return restored.detach()


def dequantization(conversion: Conversion) -> Any:
    """The operation of a converter that restores quantized weights, `None` if it has none."""
    operations = getattr(conversion.transform, "operations", None) or [None]
    return operations[0] if getattr(operations[0], "hf_quantizer", None) is not None else None


def roles_of(conversion: Conversion) -> dict[str, list[tuple[str, str]]]:
    """The sources of a conversion by the last part of their names, in the converter's order."""
    roles: dict[str, list[tuple[str, str]]] = {}
    for pattern in conversion.transform.source_patterns:
        role = _role(pattern)
        if role != _UNUSED and (found := [source for source in conversion.sources if source[1] == pattern]):
            roles.setdefault(role, []).extend(found)
    return roles


def without_dequantization(conversion: Conversion, sources: list[tuple[str, str]]) -> Conversion:
    """What is left of a conversion when its weights are not quantized, or not yet restored."""
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
) -> Located:
    """Follows the tensors of each role through the conversion.

    Args:
        shape: of the parameter, `[E, ..]`.

    Raises:
        CheckpointError: tensors are missing or do not fit together.
        UnsupportedModelError: a dtype or a conversion that can't be followed.
    """
    roles = roles_of(conversion)
    first, *others = roles
    for role in others:
        if len(roles[role]) != len(roles[first]):
            raise CheckpointError(
                f"{target}: the checkpoint has {len(roles[first])} tensors {first}, but {len(roles[role])} {role}; "
                "is it complete?"
            )
    follow = _Followed(model, headers, target, conversion, roles, shape[0])
    pieces = tuple(follow.piece(role) for role in roles)
    for role in others:
        follow.refuse_parted(role)
    operation = LoadOperation(
        dequantization(conversion), [sources[0][1] for sources in roles.values()], target.rpartition(".")[2]
    )
    transposed = pieces[0].stored.transposed
    parts, axis = _try(target, operation, pieces, shape[:0:-1] if transposed else shape[1:])
    return Located(pieces, operation, transposed, parts, axis)


class _Followed:
    """The tensors of one quantized parameter on their way through its conversion."""

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
        """Where the tensors of `role` are, for every expert."""
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

    def refuse_parted(self, role: str) -> None:
        """Raises `UnsupportedModelError` where rows do not keep their scales: when blocks are cut or interleaved."""
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
        """Whether the checkpoint has one tensor for all experts, which nothing rearranges."""
        transform = self._conversion.transform
        alone = isinstance(transform, WeightConverter) and len(transform.operations) == 1
        if alone and any(len(h) != 1 or h[0].shape[:1] != (self._experts,) for h in self._headers.values()):
            raise CheckpointError(f"{self._target}: the checkpoint's tensors are not of {self._experts} experts")
        return alone

    def _convert(self, labels: list[Tensor]) -> Tensor:
        """Labels `[.., R, 1]` of one role's tensors, as the conversion puts them together: `[E, R, 1]` or `[E, 1, R]`.

        Operations know tensors by the names of what is dequantized: scales go by those too.
        """
        part = without_dequantization(self._conversion, self._main)
        converted = convert_labels(self._model, self._target, part, labels, by_rows=True)
        found = converted.get(self._target)
        if len(converted) > 1 or found is None or found.dim() != 3 or 1 not in found.shape[1:]:
            raise UnsupportedModelError(
                f"{self._target}: transformers converts these quantized experts in a way that finemoe can't follow"
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
    """A stored tensor's shape; one scale for a whole matrix counts as a grid of one block."""
    return header.shape if len(header.shape) > 1 else (1, prod(header.shape))


def _try(
    target: str, operation: LoadOperation, pieces: Sequence[StoredPiece], expected: tuple[int, ...]
) -> tuple[int, int]:
    """Restores the first rows, as zeros, to see whether the shapes fit.

    Returns:
        Into how many parts the pieces can be cut along their first dimension, and along which dimension the results
        are put together.
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
            raise UnsupportedModelError(f"{target}: transformers can't restore its weights ({reason})") from error
    one, two = shapes
    axis = next((i for i, (a, b) in enumerate(zip(one, two, strict=True)) if a != b), 0)
    whole = tuple(size * parts if i == axis else size for i, size in enumerate(one))
    if whole != expected:
        raise CheckpointError(f"{target}: its tensors restore to {list(whole)}, the model expects {list(expected)}")
    return parts, axis
