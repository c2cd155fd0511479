"""Workers on tiny float32 models, in which rounding is too small for batching to change answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import finemoe
from finemoe.serving.config import ServeConfig
from finemoe.serving.scheduler.worker import BatchingWorker
from tests.tiny import Make, eager

Serve = Callable[..., BatchingWorker]
SMALL: dict[str, Any] = {"cache_bytes": "1MiB", "max_batch_tokens": 16, "max_running": 4}


def a_prompt(length: int, seed: int = 0) -> list[int]:
    """Token ids `[length]`."""
    return torch.randint(3, 100, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def greedy(model: Any, prompt: list[int], new_tokens: int) -> list[int]:
    """The answer of `generate`, without stop tokens."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, eos_token_id=None, pad_token_id=0,
        max_new_tokens=new_tokens,
    )  # fmt: skip
    answer: list[int] = output[0, len(prompt) :].tolist()
    return answer


@contextmanager
def serving(model: Any, **settings: Any) -> Iterator[BatchingWorker]:
    """A worker; checks at the end that it leaves a consistent pool and no thread."""
    worker = BatchingWorker(model, ServeConfig(**SMALL | settings))
    try:
        yield worker
        load = worker.load()
        assert load.free_cache_blocks == load.cache_blocks or load.running
    finally:
        worker.close()
        assert not worker._thread.is_alive()
    model.finemoe.check_integrity()


@pytest.fixture(scope="package")
def eager_model(tiny: Make) -> Any:
    return eager(tiny())


@pytest.fixture(scope="package")
def offloaded(tiny: Make) -> Iterator[Any]:
    with finemoe.load(tiny(), expert_memory="40%") as model:
        yield model
