"""Builds the expert index by running transformers' weight conversion on addresses.

The rules (renamings, converters, base-model prefixes) are transformers' own objects, applied as its loader does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from finemoe.checkpoint.expert_index import (
    Addresses,
    ExpertIndex,
    LayerBuilder,
    QuantizedParameter,
    address_items,
    address_rows,
    stored_items,
    stored_rows,
)
from finemoe.checkpoint.headers import TensorHeader
from finemoe.checkpoint.label_conversion import Conversion, convert_labels
from finemoe.checkpoint.quantized_layout import (
    QuantizedSource,
    dequantization,
    locate_quantized,
    roles_of,
    without_dequantization,
)
from finemoe.errors import CheckpointError, UnsupportedModelError
from finemoe.types import ByteRange, ExpertId

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_Stored = tuple[Addresses, torch.dtype] | QuantizedSource
_SMALL_ITEMS = 1 << 24  # the largest parameter to be addressed element by element: 128 MiB of addresses


@dataclass(frozen=True)
class ExpertsModule:
    """One experts module of the model: its name, and its parameters `[E, ..]` by name."""

    name: str
    experts: int
    parameters: dict[str, torch.Tensor]  # on meta
    same_as: str | None = None  # the module that it shares its experts with, where transformers ties them


def read_expert_index(
    model: PreTrainedModel,
    modules: list[ExpertsModule],
    headers: Mapping[str, TensorHeader],
    weight_mapping: list[Any],
) -> tuple[set[str], ExpertIndex]:
    """The names of all tensors that are not routed experts', and the expert index.

    Args:
        model: on the meta device.
        modules: its experts modules; tied ones share an entry of the index.
        headers: of the checkpoint's tensors.
        weight_mapping: the model's `WeightTransform`s; not changed.

    Raises:
        CheckpointError: the checkpoint lacks an expert's tensor, or has one of the wrong shape.
        UnsupportedModelError: the dtype or the conversion is not supported.
    """
    routed = {f"{module.name}.{name}" for module in modules for name in module.parameters}
    dense, conversions = split_keys(model, headers, weight_mapping, routed)
    own = [module for module in modules if module.same_as is None]
    filled = {f"{module.name}.{name}" for module in own for name in module.parameters}
    mine = {target: conversion for target, conversion in conversions.items() if target in filled}
    return dense, build_expert_index(model, own, headers, mine)


def split_keys(
    model: PreTrainedModel, keys: Iterable[str], weight_mapping: list[Any], routed: set[str]
) -> tuple[set[str], dict[str, Conversion]]:
    """Split a checkpoint's tensors into dense ones and those of routed experts, by transformers' renaming rules.

    Args:
        model: on the meta device.
        keys: names of the checkpoint's tensors.
        weight_mapping: the model's `WeightTransform`s; not changed.
        routed: full names of the experts' parameters.

    Returns:
        The names of dense tensors, and the conversions of experts, by the first parameter that each fills.
    """
    mapping = deepcopy(weight_mapping)  # renaming changes the rules
    renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    meta_state = model.state_dict()
    prefix = model.base_model_prefix
    dense: set[str] = set()
    conversions: dict[str, Conversion] = {}
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, meta_state)
        if target not in meta_state and key in meta_state:
            target, pattern = rename_source_key(key, [], [], prefix, meta_state)
        if target not in routed:
            dense.add(key)
            continue
        if target not in conversions:
            rule = WeightRenaming(key, target) if pattern is None else deepcopy(by_pattern[pattern])
            conversions[target] = Conversion(rule)
        conversions[target].sources.append((key, pattern or key))
    return dense, conversions


def build_expert_index(
    model: PreTrainedModel,
    modules: list[ExpertsModule],
    headers: Mapping[str, TensorHeader],
    conversions: Mapping[str, Conversion],
) -> ExpertIndex:
    """The index of all experts of `modules`, one layer for each.

    Raises:
        CheckpointError: the checkpoint lacks an expert's tensor, or has one of the wrong shape.
        UnsupportedModelError: the dtype or the conversion is not supported.
    """
    owners = {f"{module.name}.{name}": module for module in modules for name in module.parameters}
    located: dict[str, _Stored] = {}
    for target, conversion in conversions.items():
        located.update(_locate(model, owners, headers, target, conversion))
    layouts = []
    byte_ranges: dict[ExpertId, tuple[ByteRange, ...]] = {}
    for layer, module in enumerate(modules):
        builder = LayerBuilder(layer, module.name, module.experts)
        for name, parameter in module.parameters.items():
            full_name = f"{module.name}.{name}"
            if full_name not in located:
                raise CheckpointError(f"the checkpoint has no tensor for {full_name}; is it complete?")
            _add(builder, name, tuple(parameter.shape[1:]), located[full_name])
        layout, layer_ranges = builder.build()
        layouts.append(layout)
        byte_ranges.update(layer_ranges)
    return ExpertIndex(layouts, byte_ranges)


def _add(builder: LayerBuilder, name: str, shape: tuple[int, ...], stored: _Stored) -> None:
    """Append one parameter, of one expert's `shape`, to a layout."""
    if not isinstance(stored, QuantizedSource):
        rows, dtype = stored
        builder.add(name, shape, dtype, rows)
        return
    fields = []
    for piece in stored.pieces:
        fields.append(f"{name}.{piece.role}")
        as_stored = replace(piece.stored, transposed=False)  # only the dequantized matrix is transposed
        builder.add(fields[-1], piece.stored.stored_shape, piece.dtype, as_stored)
    builder.add_quantized(
        QuantizedParameter(
            name,
            shape,
            stored.dequantize.method,
            tuple(fields),
            stored.dequantize,
            stored.transposed,
            stored.parts,
            stored.axis,
        )
    )


def _locate(
    model: PreTrainedModel,
    owners: Mapping[str, ExpertsModule],
    headers: Mapping[str, TensorHeader],
    target: str,
    conversion: Conversion,
) -> Mapping[str, _Stored]:
    """Run one conversion on addresses. Returns where each parameter that it fills is stored."""
    shape = _parameter(owners, target).shape
    if dequantization(conversion) is not None:
        roles = roles_of(conversion)
        if len(roles) > 1:
            return {target: locate_quantized(model, headers, target, conversion, tuple(shape))}
        conversion = without_dequantization(conversion, next(iter(roles.values())))  # not quantized
    sources = [headers[key] for key, _ in conversion.sources]
    first_key, first = conversion.sources[0][0], sources[0]
    if first.dtype not in DTYPES:
        raise UnsupportedModelError(
            f"{first_key} is stored as {first.dtype}; finemoe offloads experts stored as {', '.join(DTYPES)}"
        )
    for (key, _), header in zip(conversion.sources, sources, strict=True):
        if header.dtype != first.dtype:
            raise CheckpointError(f"{key} is stored as {header.dtype}, but {first_key} as {first.dtype}")
    dtype = DTYPES[first.dtype]
    columns = first.shape[-1] if first.shape else 1
    by_rows = len(shape) > 2 and all(len(h.shape) > 1 and h.shape[-1] == columns for h in sources)
    if not by_rows and sum(h.length_bytes for h in sources) // dtype.itemsize > _SMALL_ITEMS:
        raise UnsupportedModelError(f"{target}: its tensors differ in row length, which finemoe does not support")
    make = address_rows if by_rows else address_items
    labels = [make(header.file, header.offset_bytes, header.shape, dtype.itemsize) for header in sources]
    result: dict[str, _Stored] = {}
    for name, addresses in convert_labels(model, target, conversion, labels, by_rows=by_rows).items():
        expected = tuple(_parameter(owners, name).shape)
        if addresses.dim() == 0 or addresses.shape[0] != expected[0]:
            raise CheckpointError(
                f"{name}: the checkpoint has {addresses.shape[0] if addresses.dim() else 0} experts "
                f"where the model expects {expected[0]}; is it complete?"
            )
        if by_rows:
            result[name] = stored_rows(name, expected, addresses, columns, dtype.itemsize), dtype
        else:
            result[name] = stored_items(name, expected, addresses, dtype.itemsize), dtype
    return result


def _parameter(owners: Mapping[str, ExpertsModule], full_name: str) -> torch.Tensor:
    if full_name not in owners:
        raise UnsupportedModelError(f"{full_name} is filled together with experts, but is no expert parameter itself")
    return owners[full_name].parameters[full_name.rpartition(".")[2]]
