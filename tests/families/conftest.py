"""Fixtures of the tests of families."""

from collections.abc import Iterator

import pytest
import torch
from transformers.utils import logging


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A fixed order of summation; the models are too small to gain from more threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def no_progress() -> None:
    """Progress bars of several hundred loads would hide the failures."""
    logging.disable_progress_bar()
