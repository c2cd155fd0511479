"""Tests that need a GPU: `FINEMOE_TEST_GPU=1 pytest -m gpu tests/gpu`. Elsewhere they are skipped."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _needs_cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and FINEMOE_TEST_GPU=1")
