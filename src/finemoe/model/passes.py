"""What a forward pass is given, read off its arguments."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from torch import Tensor, nn


class Pass(NamedTuple):
    """A forward pass that is about to run."""

    mask: Tensor | None  # [B, past + S], where one was given as such
    fresh: bool  # it has no past: its requests are new


def read_pass(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Pass:
    """The pass that a model's forward pre-hook is told of."""
    given = inspect.signature(module.forward).bind_partial(*arguments, **keywords).arguments
    given |= given.pop("kwargs", {})
    mask, past = given.get("attention_mask"), given.get("past_key_values")
    return Pass(
        mask=mask if isinstance(mask, Tensor) and mask.dim() == 2 else None,
        fresh=past is None or not hasattr(past, "get_seq_length") or past.get_seq_length() == 0,
    )
