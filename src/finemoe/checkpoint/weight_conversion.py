"""Runs transformers' weight conversion on addresses: which checkpoint tensors become which experts, and how.

The rules (renamings, converters, base-model prefixes) are transformers' own objects, used the way its loader uses them.
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
    Quantized,
    address_items,
    address_rows,
    stored_items,
    stored_rows,
)
from finemoe.checkpoint.headers import TensorHeader
from finemoe.checkpoint.label_conversion import Conversion, convert_labels
from finemoe.checkpoint.quantized_layout import (
    Located,
    dequantization,
    locate_quantized,
    roles_of,
    without_dequantization,
)
from finemoe.errors import CheckpointError, UnsupportedModelError
from finemoe.types import ByteRange, ExpertId

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_Stored = tuple[Addresses, torch.dtype] | Located
_SMALL_ITEMS = 1 << 24  # up to here a parameter may be followed element by element: 128 MiB of addresses


@dataclass(frozen=True)
class ExpertsModule:
    """One experts module of the model: its name, and its parameters `[E, ..]` by name."""

    name: str
    experts: int
    parameters: dict[str, torch.Tensor]  # on meta
    same_as: str | None = None  # the module whose experts these are, where transformers ties them


def read_expert_index(
    model: PreTrainedModel,
    modules: list[ExpertsModule],
    headers: Mapping[str, TensorHeader],
    weight_mapping: list[Any],
) -> tuple[set[str], ExpertIndex]:
    """Where every expert lies, and the names of all tensors that belong to no expert.

    Args:
        model: built on meta.
        modules: its experts modules; those that are tied to another share its entry in the catalog.
        headers: of the checkpoint's tensors.
        weight_mapping: the model's `WeightTransform`s; not changed.

    Raises:
        CheckpointError: the checkpoint lacks an expert's tensor, or has one of the wrong shape.
        UnsupportedModelError: a dtype or a conversion that can't be followed.
    """
    routed = {f"{module.name}.{name}" for module in modules for name in module.parameters}
    dense, conversions = sort_keys(model, headers, weight_mapping, routed)
    own = [module for module in modules if module.same_as is None]
    filled = {f"{module.name}.{name}" for module in own for name in module.parameters}
    mine = {target: conversion for target, conversion in conversions.items() if target in filled}
    return dense, build_expert_index(model, own, headers, mine)


def sort_keys(
    model: PreTrainedModel, keys: Iterable[str], weight_mapping: list[Any], routed: set[str]
) -> tuple[set[str], dict[str, Conversion]]:
    """Tells the tensors of routed experts from all others, by transformers' renaming rules.

    Args:
        keys: names of the checkpoint's tensors.
        weight_mapping: the model's `WeightTransform`s; not changed.
        routed: full names of the experts' parameters.

    Returns:
        The keys of all other tensors, and the conversions that fill the experts by the first parameter that each fills.
    """
    mapping = deepcopy(weight_mapping)  # renaming leaves marks in the rules
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
    """Where every expert's parameters lie.

    Raises:
        CheckpointError: the checkpoint lacks an expert's tensor, or has one of the wrong shape.
        UnsupportedModelError: a dtype or a conversion that can't be followed.
    """
    owners = {f"{module.name}.{name}": module for module in modules for name in module.parameters}
    located: dict[str, _Stored] = {}
    for target, conversion in conversions.items():
        located.update(_locate(model, owners, headers, target, conversion))
    layouts = []
    runs: dict[ExpertId, tuple[ByteRange, ...]] = {}
    for layer, module in enumerate(modules):
        builder = LayerBuilder(layer, module.name, module.experts)
        for name, parameter in module.parameters.items():
            full_name = f"{module.name}.{name}"
            if full_name not in located:
                raise CheckpointError(f"the checkpoint has no tensor for {full_name}; is it complete?")
            _add(builder, name, tuple(parameter.shape[1:]), located[full_name])
        layout, layer_runs = builder.build()
        layouts.append(layout)
        runs.update(layer_runs)
    return ExpertIndex(layouts, runs)


def _add(builder: LayerBuilder, name: str, shape: tuple[int, ...], stored: _Stored) -> None:
    """Append one parameter, of one expert's `shape`, to a layout."""
    if not isinstance(stored, Located):
        rows, dtype = stored
        builder.add(name, shape, dtype, rows)
        return
    fields = []
    for piece in stored.pieces:
        fields.append(f"{name}.{piece.role}")
        as_stored = replace(piece.stored, transposed=False)  # only what is restored is turned round
        builder.add(fields[-1], piece.stored.stored_shape, piece.dtype, as_stored)
    builder.add_quantized(
        Quantized(
            name,
            shape,
            stored.dequantize.form,
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
    """Runs one conversion on addresses. Returns where every parameter that it fills is stored, and how."""
    shape = _parameter(owners, target).shape
    if dequantization(conversion) is not None:
        roles = roles_of(conversion)
        if len(roles) > 1:
            return {target: locate_quantized(model, headers, target, conversion, tuple(shape))}
        conversion = without_dequantization(conversion, next(iter(roles.values())))  # left as they were trained
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
        raise UnsupportedModelError(f"{target}: its tensors differ in row length; transformers' conversion of them "
                                    "can't be followed row by row")  # fmt: skip
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
