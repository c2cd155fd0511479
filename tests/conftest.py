"""Settings and fixtures of all tests: no network, one thread, the same random examples in every run."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may download a model

os.environ["FINEMOE_MAPS"] = "none"  # policies save what they learn only where a test says so

if not os.environ.get("FINEMOE_TEST_GPU"):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported: `auto` is the CPU, except in GPU tests

import pytest
import torch
from hypothesis import settings

from tests.tiny import Make, write

torch.set_num_threads(1)  # the models are too tiny for a second thread
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=50)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes the folder of a tiny checkpoint of a family and dtype; shared between tests, so read-only."""
    made: dict[tuple[object, ...], Path] = {}

    def make(family: str = "mixtral", dtype: str = "float32", **options: Any) -> Path:
        key = family, dtype, *sorted(options.items())
        if key not in made:
            made[key] = write(tmp_path_factory.mktemp(family), family, dtype, **options)
        return made[key]

    return make


@pytest.fixture
def own_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command may change the process (signals, loggers, environment); this restores it."""
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("finemoe.cli.return_freed_memory", lambda: None)
    for name in ("TRANSFORMERS_VERBOSITY", "TRANSFORMERS_NO_ADVISORY_WARNINGS", "HF_HUB_VERBOSITY"):
        monkeypatch.setenv(name, "error")
    loggers = [logging.getLogger(name) for name in ("finemoe.serving", "uvicorn.error")]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    signal.signal(signal.SIGINT, handler)
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


@pytest.fixture(scope="session")
def reference_model() -> Path:
    """Folder of the reference model, built if necessary; tests that use it are skipped where it can't be built."""
    from finemoe.errors import ReferenceModelError
    from finemoe.model.reference import ensure

    try:
        return ensure(progress=False)
    except ReferenceModelError as error:
        pytest.skip(f"no reference model here: {error}")
