"""Which backend runs a model: transformers for checkpoints, llama.cpp for GGUF files. Imports only that one."""

from __future__ import annotations

from typing import Any

from finemoe.config import LoadConfig
from finemoe.errors import ConfigError
from finemoe.gguf.locate import is_gguf
from finemoe.learned import check_map_store
from finemoe.policy import policy_class


def load_config(config: LoadConfig) -> Any:
    """The model that `config` names, loaded.

    Raises:
        FinemoeError: as `finemoe.load`.
    """
    kind = policy_class(config.policy)  # an unknown one is refused before anything is read
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
    """The session of a loaded model: prompts in, text and timings out."""
    from finemoe.gguf.model import GgufModel

    if isinstance(model, GgufModel):
        from finemoe.model.gguf_generation import GgufSession

        return GgufSession(model)
    from finemoe.model.generation import Session

    return Session(model)
