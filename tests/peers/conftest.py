"""The scripts of benchmarks/peers as modules."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "peers"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports one by its name, as its neighbours do."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module
