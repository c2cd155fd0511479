"""A tiny chat model, eager and offloaded, shared by tests that leave it intact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import finemoe
from tests.chat_model import make_chat_model
from tests.tiny import eager


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="session")
def eager_model(chat_folder: Path) -> Any:
    return eager(chat_folder)


@pytest.fixture(scope="module")
def shared(chat_folder: Path) -> Iterator[Any]:
    with finemoe.load(chat_folder, expert_memory="40%", policy="lfru") as model:  # on demand: no prefetches
        yield model


@pytest.fixture
def offloaded(shared: Any) -> Iterator[Any]:
    """Starts with an empty pool; afterwards its bookkeeping must be consistent."""
    shared.finemoe.evict_all()
    shared.finemoe.reset_stats()
    yield shared
    shared.finemoe.check_integrity()
