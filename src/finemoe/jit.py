"""Compiles the policy's kernels with numba, which is imported only here, and only when asked for.

Compiled code is kept in the user's cache folder, under a hash of all their sources: numba itself only looks at the
file of the function that is called, not at those that it calls.
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


@cache
def compiler() -> Jit[Any]:
    """A `Jit` that compiles.

    The first use on a machine takes seconds a kernel; later ones load what was compiled.
    """
    import numba

    folder = _folder()
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


def ready() -> bool:
    """Whether anything was compiled on this machine yet."""
    folder = _folder()
    return folder is not None and any(folder.rglob("*.nbi"))


def _register() -> None:
    """Lets compiled code call the kernels of every module that was imported by now."""
    from numba.extending import overload, register_jitable

    for function, source in KERNELS.items():
        if function in _registered:
            continue
        _registered.add(function)
        if source is function:
            register_jitable(function)
        else:
            overload(function, strict=False)(lambda *_, source=source, **__: source)


_registered: set[Callable[..., Any]] = set()


def _folder() -> Path | None:
    """Where compiled code is kept; `None` if nothing can be written anywhere."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for package in ("policy", "sim"):
        for path in sorted(Path(__file__).with_name(package).rglob("*.py")):
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
