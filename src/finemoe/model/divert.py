"""The one function of transformers' loader that turns a checkpoint's tensors into parameters, replaced for a load."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel, modeling_utils

_LOADING = threading.Lock()  # it is wrapped by one load at a time


@contextmanager
def diverted(replacement: Callable[..., Any]) -> Iterator[None]:
    """Wraps transformers' function that turns a checkpoint's tensors into parameters, for the time of a load."""
    with _LOADING:
        original = modeling_utils.convert_and_load_state_dict_in_model
        loading = threading.get_ident()

        def wrapped(model: PreTrainedModel, state_dict: Any, load_config: Any, disk_offload_index: Any = None) -> Any:
            if threading.get_ident() != loading:  # someone else's load, of a model of their own
                return original(model, state_dict, load_config, disk_offload_index)
            return replacement(original, model, load_config)

        modeling_utils.convert_and_load_state_dict_in_model = wrapped
        try:
            yield
        finally:
            modeling_utils.convert_and_load_state_dict_in_model = original
