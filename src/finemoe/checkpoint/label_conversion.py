"""Runs one of transformers' weight conversions on labels (addresses) instead of weights."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming

from finemoe.errors import CheckpointError


@dataclass
class Conversion:
    """One converter instance and its source tensors; it makes one parameter of them (or, rarely, several)."""

    transform: WeightConverter | WeightRenaming
    sources: list[tuple[str, str]] = field(default_factory=list)  # (tensor, source pattern)


class _CollapsedModel:
    """The model as operations see it that ask for a parameter's shape: rows are collapsed to one label each."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def get_parameter(self, name: str) -> torch.Tensor:
        parameter = self._model.get_parameter(name)
        return torch.empty(*parameter.shape[:-1], 1, device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def convert_labels(
    model: PreTrainedModel, target: str, conversion: Conversion, labels: Sequence[Any], *, by_rows: bool
) -> dict[str, torch.Tensor]:
    """Run a conversion on labels. Returns the converted labels of each parameter that it fills, by name.

    Args:
        model: whose parameters are filled.
        target: the first parameter that the conversion fills.
        conversion: to run; not changed.
        labels: one tensor for each of its sources.
        by_rows: labels are `[.., R, 1]`, one for each row of weights.

    Raises:
        CheckpointError: the tensors do not fit together.
    """
    transform = deepcopy(conversion.transform)  # add_tensor changes it
    for (key, pattern), tensor in zip(conversion.sources, labels, strict=True):
        transform.add_tensor(target, key, pattern, tensor)
    if isinstance(transform, WeightConverter) and not transform.operations:  # its only operation was a dequantization
        collected = list(transform.materialize_tensors().values())
        return {target: collected[0][0]}
    visible_model: Any = _CollapsedModel(model) if by_rows else model
    try:
        converted = transform.convert(target, model=visible_model, config=model.config)
    except (ValueError, RuntimeError, IndexError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{target}: its tensors do not fit together ({reason}); is the checkpoint complete?"
        ) from error
    return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}
