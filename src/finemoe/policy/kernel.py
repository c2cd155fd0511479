"""Marks the policy's hot loops, so that they can be compiled.

A kernel is a plain function over numpy arrays. The engine interprets it unless a policy is too heavy for that; the
simulator compiles it (`finemoe.compiled`). The source is one, so the interpreted kernel is the compiled one's twin.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])
Jit = Callable[[F], F]

KERNELS: dict[Callable[..., Any], Callable[..., Any]] = {}  # what is called -> what is compiled in its place


def kernel(function: F) -> F:
    """Marks a function that compiled code may call. It stays what it is."""
    KERNELS[function] = function
    return function


def compiled_as(loop: F) -> Callable[[F], F]:
    """Like `kernel`, for one that numpy does best while interpreted, and a loop once compiled.

    Args:
        loop: does the same; it is compiled wherever the marked function is called from compiled code.
    """

    def mark(function: F) -> F:
        KERNELS[function] = loop
        return function

    return mark


def interpreted(function: F) -> F:
    """The `Jit` that compiles nothing."""
    return function
