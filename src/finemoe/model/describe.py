"""What a model is made of, from its config and its checkpoint's headers alone. Reads no weights, downloads none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from finemoe.checkpoint import Catalog
from finemoe.checkpoint.convert import read_catalog
from finemoe.checkpoint.locate import locate_headers
from finemoe.dequantise import scratch_bytes
from finemoe.model.find import (
    IN_FLIGHT_SLOTS,
    active_experts,
    find_experts,
    model_class,
    read_config,
    transformers_errors,
)
from finemoe.model.quantised import quantizer_of, restored_bytes
from finemoe.quantise import SCHEMES, ExpertCopy


@dataclass(frozen=True)
class Description:
    """A model's sizes."""

    name: str
    kind: str  # class of the model
    catalog: Catalog
    dense_bytes: int  # everything in memory that is not a slot for experts
    active: int  # K
    least_slots: int  # the smallest pool that a load accepts
    lossy: bool = False  # experts as a copy in fewer bits

    @property
    def layers(self) -> int:
        return len(self.catalog.layouts)


def describe(
    model: str, revision: str | None = None, *, trust_remote_code: bool = False, expert_dtype: str = "stored"
) -> Description:
    """Describe a folder or a hub model; of the latter, only the config and the headers are fetched.

    Raises:
        CheckpointError, ConfigError, UnsupportedModelError: as `load` would, where headers are enough to tell.
    """
    folder, headers = locate_headers(model, revision)
    config = read_config(folder, trust_remote_code=trust_remote_code)
    kind = model_class(config)
    build = kind._from_config if issubclass(kind, PreTrainedModel) else kind.from_config
    with transformers_errors(folder), torch.device("meta"):
        empty = build(config)
    modules = [module for module, _ in find_experts(empty)]
    conversions = get_model_conversion_mapping(empty, hf_quantizer=quantizer_of(config))
    dense, catalog = read_catalog(empty, modules, headers, conversions)
    if (scheme := SCHEMES.get(expert_dtype)) is not None:
        catalog = ExpertCopy(catalog, scheme, folder).catalog  # nothing is written
    dense_bytes = restored_bytes((headers[key] for key in dense), empty.dtype)
    active = active_experts(config)
    return Description(
        name=model,
        kind=type(empty).__name__,
        catalog=catalog,
        dense_bytes=dense_bytes + scratch_bytes(catalog.layouts, empty.dtype),
        active=active,
        least_slots=min(active + IN_FLIGHT_SLOTS, catalog.experts),
        lossy=scheme is not None,
    )
