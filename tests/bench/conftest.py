"""What tests of benchmarks share."""

from __future__ import annotations

import pytest

from tests.bench.rows import run_rows_here


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows run in this process."""
    run_rows_here(monkeypatch)
