"""Selects the backend: transformers for checkpoints, llama.cpp for GGUF files. Imports only the selected one."""

from __future__ import annotations

from typing import Any

from finemoe.config import LoadConfig
from finemoe.errors import ConfigError
from finemoe.gguf.locate import is_gguf
from finemoe.learned import check_map_store
from finemoe.policy import policy_class


def load_config(config: LoadConfig) -> Any:
    """Load the model named by `config`.

    Raises:
        FinemoeError: see `finemoe.load`.
    """
    kind = policy_class(config.policy)  # rejects an unknown policy before reading files
    if ("predictors" in kind.needs) != (config.predictors is not None):
        raise ConfigError(
            f"--policy {config.policy}: needs --predictors FILE, from finemoe trace train"
            if config.predictors is None
            else f"--predictors: --policy {config.policy} takes none"
        )
    check_map_store(config.map_store, config.policy)
    if is_gguf(config.model):
        from finemoe.model.gguf_loader import load_gguf

        return load_gguf(config)
    from finemoe.model.load import load_checkpoint

    return load_checkpoint(config)


def open_session(model: Any) -> Any:
    """A session of a loaded model, which turns prompts into text and timings."""
    from finemoe.gguf.model import GgufModel

    if isinstance(model, GgufModel):
        from finemoe.model.gguf_generation import GgufSession

        return GgufSession(model)
    from finemoe.model.generation import Session

    return Session(model)
