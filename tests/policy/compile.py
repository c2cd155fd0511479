"""Compiles kernels the way the simulator does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from finemoe.jit import compiler


def compiled(function: Callable[..., Any]) -> Any:
    """A `Jit`."""
    return compiler()(function)
