"""The programs of benchmarks/peers as modules."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Script = Callable[[str], Any]
SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "peers"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """Imports a program of that folder by name."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module
