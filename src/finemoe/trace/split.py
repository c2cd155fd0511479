"""Which requests fill the store of maps, and which are replayed: one split, the same wherever it is needed."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def split(requests: int, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Indices of the requests for the store and of those to replay, shuffled.

    Args:
        requests: how many there are.
        share: of them, for the store; rounded to whole requests.
        seed: of the shuffle.
    """
    shuffled = np.random.default_rng(seed).permutation(requests)
    stored = round(requests * share)
    return shuffled[:stored], shuffled[stored:]
