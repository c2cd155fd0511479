"""What the tests of the families share."""

from collections.abc import Iterator

import pytest
import torch
from transformers.utils import logging


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order; and the models are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def no_progress() -> None:
    """A bar for each of several hundred loads hides what failed."""
    logging.disable_progress_bar()
