"""Marks the policy's hot loops, so that they can be compiled.

A kernel is a plain function over numpy arrays. The engine interprets it unless a policy is too heavy for that; the
simulator compiles it (`finemoe.compiled`). The source is one, so the interpreted kernel is the compiled one's twin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
Jit = Callable[[F], F]

KERNELS: list[Callable[..., Any]] = []


def kernel(function: F) -> F:
    """Marks a function that compiled code may call. It stays what it is."""
    KERNELS.append(function)
    return function


def interpreted(function: F) -> F:
    """The `Jit` that compiles nothing."""
    return function
