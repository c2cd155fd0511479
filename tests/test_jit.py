"""The cache of compiled code: its key covers every file that compiled code depends on."""

from __future__ import annotations

import re
from pathlib import Path

import finemoe.jit


def test_the_cache_key_covers_every_module_with_kernels() -> None:
    source = Path(finemoe.jit.__file__).parent
    modules = {
        path for path in source.rglob("*.py") if re.search(r"^@(kernel|compiled_as)\b", path.read_text(), re.MULTILINE)
    }
    assert len(modules) > 10
    assert modules <= set(finemoe.jit._kernel_sources())
