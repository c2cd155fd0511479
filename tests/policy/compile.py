"""Compiles kernels the way the simulator does, without the simulator."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba

from finemoe.policy.kernel import KERNELS


@cache
def _let_kernels_call_kernels() -> None:
    for function in KERNELS:
        numba.extending.register_jitable(function)


@cache
def compiled(function: Callable[..., Any]) -> Any:
    """A `Jit`."""
    _let_kernels_call_kernels()
    return numba.njit(function)
