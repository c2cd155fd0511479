"""Runs transformers' weight conversion on addresses: which checkpoint tensors become which experts, and how.

The rules (renamings, converters, base-model prefixes) are transformers' own objects, used the way its loader uses them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from finemoe.checkpoint.catalog import Catalog, LayerBuilder, address_items, address_rows, stored_items, stored_rows
from finemoe.checkpoint.headers import TensorHeader
from finemoe.errors import CheckpointError, UnsupportedModelError
from finemoe.types import ExpertId, Run

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_SMALL_ITEMS = 1 << 24  # up to here a parameter may be followed element by element: 128 MiB of addresses


@dataclass(frozen=True)
class ExpertsModule:
    """One experts module of the model: its name, and its parameters `[E, ..]` by name."""

    name: str
    experts: int
    parameters: dict[str, torch.Tensor]  # on meta
    same_as: str | None = None  # the module whose experts these are, where transformers ties them


@dataclass
class _Conversion:
    """All tensors that one converter instance turns into one parameter (or, rarely, several)."""

    transform: WeightConverter | WeightRenaming
    sources: list[tuple[str, str]] = field(default_factory=list)  # (tensor, source pattern)


class _CollapsedModel:
    """Shows the model to operations that ask for a parameter's shape, with its rows collapsed to addresses."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def get_parameter(self, name: str) -> torch.Tensor:
        parameter = self._model.get_parameter(name)
        return torch.empty(*parameter.shape[:-1], 1, device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def read_catalog(
    model: PreTrainedModel,
    modules: list[ExpertsModule],
    headers: Mapping[str, TensorHeader],
    weight_mapping: list[Any],
) -> tuple[set[str], Catalog]:
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
    return dense, build_catalog(model, own, headers, mine)


def sort_keys(
    model: PreTrainedModel, keys: Iterable[str], weight_mapping: list[Any], routed: set[str]
) -> tuple[set[str], dict[str, _Conversion]]:
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
    conversions: dict[str, _Conversion] = {}
    for key in sorted(keys, key=dot_natural_key):
        target, pattern = rename_source_key(key, renamings, converters, prefix, meta_state)
        if target not in meta_state and key in meta_state:
            target, pattern = rename_source_key(key, [], [], prefix, meta_state)
        if target not in routed:
            dense.add(key)
            continue
        if target not in conversions:
            rule = WeightRenaming(key, target) if pattern is None else deepcopy(by_pattern[pattern])
            conversions[target] = _Conversion(rule)
        conversions[target].sources.append((key, pattern or key))
    return dense, conversions


def build_catalog(
    model: PreTrainedModel,
    modules: list[ExpertsModule],
    headers: Mapping[str, TensorHeader],
    conversions: Mapping[str, _Conversion],
) -> Catalog:
    """Where every expert's parameters lie.

    Raises:
        CheckpointError: the checkpoint lacks an expert's tensor, or has one of the wrong shape.
        UnsupportedModelError: a dtype or a conversion that can't be followed.
    """
    owners = {f"{module.name}.{name}": module for module in modules for name in module.parameters}
    located: dict[str, tuple[Any, torch.dtype]] = {}
    for target, conversion in conversions.items():
        located.update(_locate(model, owners, headers, target, conversion))
    layouts = []
    runs: dict[ExpertId, tuple[Run, ...]] = {}
    for layer, module in enumerate(modules):
        builder = LayerBuilder(layer, module.name, module.experts)
        for name, parameter in module.parameters.items():
            full_name = f"{module.name}.{name}"
            if full_name not in located:
                raise CheckpointError(f"the checkpoint has no tensor for {full_name}; is it complete?")
            stored, dtype = located[full_name]
            builder.add(name, tuple(parameter.shape[1:]), dtype, stored)
        layout, layer_runs = builder.build()
        layouts.append(layout)
        runs.update(layer_runs)
    return Catalog(layouts, runs)


def _locate(
    model: PreTrainedModel,
    owners: Mapping[str, ExpertsModule],
    headers: Mapping[str, TensorHeader],
    target: str,
    conversion: _Conversion,
) -> dict[str, tuple[Any, torch.dtype]]:
    """Runs one conversion on addresses. Returns the stored rows and dtype of every parameter that it fills."""
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
    shape = _parameter(owners, target).shape
    columns = first.shape[-1] if first.shape else 1
    by_rows = len(shape) > 2 and all(len(h.shape) > 1 and h.shape[-1] == columns for h in sources)
    if not by_rows and sum(h.length_bytes for h in sources) // dtype.itemsize > _SMALL_ITEMS:
        raise UnsupportedModelError(f"{target}: its tensors differ in row length; transformers' conversion of them "
                                    "can't be followed row by row")  # fmt: skip
    converted = _convert(model, target, conversion, sources, dtype.itemsize, by_rows=by_rows)
    result: dict[str, tuple[Any, torch.dtype]] = {}
    for name, addresses in converted.items():
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


def _convert(
    model: PreTrainedModel,
    target: str,
    conversion: _Conversion,
    sources: list[TensorHeader],
    item_bytes: int,
    *,
    by_rows: bool,
) -> dict[str, torch.Tensor]:
    make = address_rows if by_rows else address_items
    for (key, pattern), header in zip(conversion.sources, sources, strict=True):
        tensor: Any = make(header.file, header.offset_bytes, header.shape, item_bytes)
        conversion.transform.add_tensor(target, key, pattern, tensor)
    seen: Any = _CollapsedModel(model) if by_rows else model
    try:
        converted = conversion.transform.convert(target, model=seen, config=model.config)
    except (ValueError, RuntimeError, IndexError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{target}: its tensors do not fit together ({reason}); is the checkpoint complete?"
        ) from error
    return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


def _parameter(owners: Mapping[str, ExpertsModule], full_name: str) -> torch.Tensor:
    if full_name not in owners:
        raise UnsupportedModelError(f"{full_name} is filled together with experts, but is no expert parameter itself")
    return owners[full_name].parameters[full_name.rpartition(".")[2]]
