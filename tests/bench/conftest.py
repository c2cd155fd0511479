"""Fixtures of the benchmark's tests."""

from __future__ import annotations

import pytest

from tests.bench.rows import run_rows_here


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows run in the test's process."""
    run_rows_here(monkeypatch)
