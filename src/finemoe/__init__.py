"""finemoe: runs Mixture-of-Experts models that do not fit into memory.

`finemoe.load()` returns a transformers model whose experts are kept in a bounded pool and loaded on demand.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from finemoe.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    ExpertReadError,
    FinemoeError,
    InvariantError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from finemoe.model.load import load

__version__ = version("finemoe")
__all__ = [
    "BudgetError",
    "CheckpointError",
    "ConfigError",
    "ExpertReadError",
    "FinemoeError",
    "InvariantError",
    "UnsupportedModelError",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    """Import `load` on first use: torch and transformers take seconds to import."""
    if name == "load":
        from finemoe.model.load import load

        return load
    raise AttributeError(f"module 'finemoe' has no attribute {name!r}")
