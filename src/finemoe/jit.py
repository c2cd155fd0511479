"""JIT compilation of kernels with numba, and the on-disk cache of compiled code.

numba is imported only here, and only on first use. Compiled code is cached in the user's cache folder under a hash of
all kernel sources: numba's own cache checks the file of the function that is called, not those of its callees.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from finemoe.system import user_cache

F = TypeVar("F", bound=Callable[..., Any])
Jit = Callable[[F], F]

KERNELS: dict[Callable[..., Any], Callable[..., Any]] = {}  # kernel -> the function that is compiled in its place
_KERNEL_PACKAGES = ("policy", "sim")


def kernel(function: F) -> F:
    """Mark a function as callable from compiled code; returns it unchanged."""
    KERNELS[function] = function
    return function


def compiled_as(loop: F) -> Callable[[F], F]:
    """Like `kernel`, for a vectorised numpy function that is faster compiled from an explicit loop.

    Args:
        loop: computes the same; compiled code calls it instead of the marked function.
    """

    def mark(function: F) -> F:
        KERNELS[function] = loop
        return function

    return mark


def interpreted(function: F) -> F:
    """The `Jit` that compiles nothing."""
    return function


@cache
def compiler() -> Jit[Any]:
    """The `Jit` that compiles with numba.

    Compiling takes seconds per kernel on first use; later processes load the cached code.
    """
    import numba

    folder = _cache_folder()
    if folder is not None:
        numba.config.CACHE_DIR = str(folder)  # type: ignore[attr-defined] # set by its own reloading
    compiled: dict[Callable[..., Any], Any] = {}

    def jit(function: F) -> F:
        if function not in compiled:
            _register()
            compiled[function] = numba.njit(cache=folder is not None, nogil=True, error_model="numpy")(function)
        dispatcher: F = compiled[function]
        return dispatcher

    return jit


def kernels_cached() -> bool:
    """Whether the cache has compiled code of these sources."""
    folder = _cache_folder()
    return folder is not None and any(folder.rglob("*.nbi"))


_registered: set[Callable[..., Any]] = set()


def _register() -> None:
    """Make the kernels of all modules imported so far callable from compiled code."""
    from numba.extending import overload, register_jitable

    for function, source in KERNELS.items():
        if function in _registered:
            continue
        _registered.add(function)
        if source is function:
            register_jitable(function)
        else:
            overload(function, strict=False)(lambda *_, source=source, **__: source)


def _kernel_sources() -> list[Path]:
    """Every file that compiled code depends on."""
    own = Path(__file__)
    return [own, *(path for name in _KERNEL_PACKAGES for path in sorted(own.with_name(name).rglob("*.py")))]


def _cache_folder() -> Path | None:
    """The folder for compiled code of these sources; `None` if neither candidate can be written."""
    digest = hashlib.sha256()
    for path in _kernel_sources():
        digest.update(path.read_bytes())
    for root in (user_cache(), Path(tempfile.gettempdir()) / "finemoe"):
        folder = root / "kernels" / digest.hexdigest()[:16]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return None
