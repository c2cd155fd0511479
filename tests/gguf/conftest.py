"""Fixtures that skip a test if llama.cpp is not installed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finemoe.errors import ConfigError
from finemoe.gguf.binding import find_library

try:
    find_library()
    MISSING = ""
except ConfigError as error:
    MISSING = str(error)

MakeFile = Callable[..., Path]


@pytest.fixture(scope="session")
def library() -> None:
    """Skips the test if the library is not available."""
    if MISSING:
        pytest.skip(MISSING)


@pytest.fixture(scope="session")
def random_gguf(library: None, tmp_path_factory: pytest.TempPathFactory) -> MakeFile:
    """Creates random files by architecture and options of `write`. Tests share them and must not modify them."""
    from tests.gguf.make import write

    made: dict[tuple[object, ...], Path] = {}

    def make(arch: str = "qwen3moe", key: object = None, **options: Any) -> Path:
        known = arch, key, *sorted((name, repr(value)) for name, value in options.items() if not callable(value))
        if known not in made:
            path = tmp_path_factory.mktemp(arch) / "model.gguf"
            if not write(path, arch, **options):
                pytest.skip(f"the library rejects a random {arch} model")
            parts = sorted(path.parent.glob("*.gguf"))
            made[known] = parts[0]
        return made[known]

    return make


@pytest.fixture
def loaded(library: None) -> Iterator[Callable[..., Any]]:
    """Loads models, each with its own engine, and closes them after the test."""
    from tests.gguf.run import load

    models: list[Any] = []

    def make(path: Path, expert_memory: str = "25%", **options: Any) -> Any:
        models.append(load(path, expert_memory, **options))
        return models[-1]

    yield make
    for model in models:
        model.close()
