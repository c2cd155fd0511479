"""Compiles the policy's kernels with numba, which is imported only here, and only when asked for.

Compiled code is kept in the user's cache folder, under a hash of every kernel's source: numba itself only looks at the
file of the function that is called, not at those that it calls.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from finemoe.folders import user_cache
from finemoe.policy.kernel import KERNELS, F, Jit


@cache
def compiler() -> Jit:
    """A `Jit` that compiles. All modules with kernels must be imported by now.

    The first use on a machine takes seconds a kernel; later ones load what was compiled.
    """
    import numba
    from numba.extending import overload, register_jitable

    folder = _folder()
    if folder is not None:
        numba.config.CACHE_DIR = str(folder)
    for function, source in KERNELS.items():
        if source is function:
            register_jitable(function)
        else:
            overload(function, strict=False)(lambda *_, source=source, **__: source)
    compiled: dict[Callable[..., Any], Any] = {}

    def jit(function: F) -> F:
        if function not in compiled:
            compiled[function] = numba.njit(cache=folder is not None, nogil=True, error_model="numpy")(function)
        dispatcher: F = compiled[function]
        return dispatcher

    return jit


def _folder() -> Path | None:
    """Where compiled code is kept; `None` if nothing can be written anywhere."""
    digest = hashlib.sha256()
    for path in sorted({__file__, *(sys.modules[function.__module__].__file__ or "" for function in KERNELS)}):
        digest.update(Path(path).read_bytes())
    for root in (user_cache(), Path(tempfile.gettempdir()) / "finemoe"):
        folder = root / "kernels" / digest.hexdigest()[:16]
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(folder, os.W_OK):
            return folder
    return None
