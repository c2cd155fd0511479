"""Sizes of a model from its config and its checkpoint's headers alone: no weights are read or downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from finemoe.checkpoint import ExpertIndex
from finemoe.checkpoint.locate import locate_headers
from finemoe.checkpoint.weight_conversion import read_expert_index
from finemoe.config import LoadConfig
from finemoe.gguf.expert_layout import group_by_block, index_experts
from finemoe.gguf.locate import is_gguf, read_headers
from finemoe.model.gguf_loader import refuse_settings
from finemoe.model.introspect import (
    IN_FLIGHT_SLOTS,
    active_experts,
    find_experts,
    model_class,
    read_config,
    transformers_errors,
)
from finemoe.model.quantized import quantizer_of, restored_bytes
from finemoe.store.quantization import SCHEMES, scratch_bytes
from finemoe.store.quantized_copy import ExpertCopy


@dataclass(frozen=True)
class Description:
    """A model's sizes."""

    name: str
    kind: str  # name of the model's class
    expert_index: ExpertIndex
    dense_bytes: int  # memory besides the expert pool
    active: int  # K, experts per token
    least_slots: int  # the smallest pool that a load accepts, in experts
    lossy: bool = False  # whether experts are a copy in fewer bits

    @property
    def layers(self) -> int:
        return len(self.expert_index.layouts)


def _describe_gguf(model: str, revision: str | None) -> Description:
    file = read_headers(model, revision)
    file.refuse_dense()
    expert_index = index_experts(group_by_block(file.expert_tensors))
    least = min(file.active_experts, expert_index.experts)
    return Description(model, file.architecture, expert_index, file.dense_bytes, file.active_experts, least)


def describe(
    model: str, revision: str | None = None, *, trust_remote_code: bool = False, expert_dtype: str = "stored"
) -> Description:
    """Describes a folder or a hub model; of a hub model, only the config and the headers are fetched.

    Raises:
        CheckpointError, ConfigError, UnsupportedModelError: as `load` would, if the headers show the fault.
    """
    if is_gguf(model):
        refuse_settings(LoadConfig(model, trust_remote_code=trust_remote_code, expert_dtype=expert_dtype))
        return _describe_gguf(model, revision)
    folder, headers = locate_headers(model, revision)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    kind = model_class(config)
    build = kind._from_config if issubclass(kind, PreTrainedModel) else kind.from_config
    with transformers_errors(folder), torch.device("meta"):
        empty = build(config)
    modules = [module for module, _ in find_experts(empty)]
    conversions = get_model_conversion_mapping(empty, hf_quantizer=quantizer_of(config))
    dense, expert_index = read_expert_index(empty, modules, headers, conversions)
    if (scheme := SCHEMES.get(expert_dtype)) is not None:
        expert_index = ExpertCopy(expert_index, scheme, folder).expert_index  # writes nothing
    dense_bytes = restored_bytes((headers[key] for key in dense), empty.dtype)
    active = active_experts(config)
    return Description(
        name=model,
        kind=type(empty).__name__,
        expert_index=expert_index,
        dense_bytes=dense_bytes + scratch_bytes(expert_index.layouts, empty.dtype),
        active=active,
        least_slots=min(active + IN_FLIGHT_SLOTS, expert_index.experts),
        lossy=scheme is not None,
    )
