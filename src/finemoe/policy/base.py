"""What a policy is: an observer of routing that keeps two scores per expert up to date.

The `CacheManager` turns the scores into fetches; the simulator's compiled twin of it does the same. So a policy never
sees slots, links or clocks, and can't break a rule of the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from finemoe.policy.cache_state import Scores
from finemoe.types import Recorded, Routed, Step

StateDict = dict[str, npt.NDArray[Any]]  # what a policy learned, by name: pure arrays


class Policy:
    """Base of all policies: on-demand loading with every resident worth the same.

    The arrays `retention_priority` and `prefetch_priority` are changed in place, never replaced after construction.

    Attributes:
        worth: `[L, E]`; of what may be evicted, the lowest goes first.
        want: `[L, E]`; while the link is idle, the absent expert with the highest is prefetched; 0 or less: never.
        margin: a prefetch must be wanted by more than this above its victim's worth. `-inf` where the two scores are
            not comparable: then it must be wanted more than its victim is.
        switch: a prefetch under way is dropped for one that is wanted this many times as much.
        prefetches: whether `prefetch_priority` is ever above 0.
        needs: what it predicts from, of `gates`, `lookahead` and `predictors`; without it, it only evicts.
        uses: what it does better with, where there is any: of `gates` and `lookahead`.
        lookahead: for how many layers ahead it wants to hear of gates, where it needs or uses that.
        substitutes: what stands in where an input of the published policy is missing, by that input's name.
        pauses: does not prefetch while that does not pay (`cache.throttle_prefetch`).
        foresees: says what a request will use from its prompt alone (`predict_request`).
        remembers: what it learns is worth keeping: `state_dict` hands it out, `load_state_dict` takes it in.
        clairvoyant: knows the future: a bound, for the simulator alone.
        compiles: its constructor takes `jit`.
        deliberates: thinks longer about an event than the model should wait for it: the engine gives it a thread.
        parts: what its constructor can leave out (`without`), for ablations.
        settings: whole numbers that its constructor takes, and its name may give.
        behind: set by who tells it of events while newer ones wait: it must observe, and need not predict.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
    """

    margin: float = -np.inf
    switch: float = np.inf
    behind: bool = False
    lookahead: int = 1
    prefetches: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[str]] = frozenset()
    substitutes: ClassVar[Mapping[str, str]] = MappingProxyType({})
    throttles_prefetch: bool = False
    predicts_requests: ClassVar[bool] = False
    is_persistent: ClassVar[bool] = False
    clairvoyant: ClassVar[bool] = False
    compiles: ClassVar[bool] = False
    runs_async: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]] = ()
    settings: ClassVar[tuple[str, ...]] = ()

    def __init__(self, layers: int, experts: int) -> None:
        self.layers = layers
        self.experts = experts
        self.retention_priority: Scores = np.zeros((layers, experts))
        self.prefetch_priority: Scores = np.zeros((layers, experts))

    def begin(self, steps: Sequence[Step]) -> None:
        """An iteration begins; one step per running request, in the order of the rows of `Routed.gates`."""

    def routed(self, event: Routed) -> None:
        """The routing of a layer is known."""

    def end(self) -> None:
        """The iteration is over: all its layers were routed."""

    def learn(self, recorded: Recorded) -> None:
        """Take in a request that was recorded earlier: the store's share of a trace."""

    def expected(self, layer: int) -> Scores | None:
        """`[E]`: the chance of each expert of `layer` to be needed next, for all that is known; `None`: no guess."""
        del layer
        return None

    def predict_request(self, embedding: npt.NDArray[np.float32]) -> Scores | None:
        """`[L, E]`: the share of its tokens that a request will send to each expert; `None`: no guess.

        Args:
            embedding: `[D]`, the mean of its prompt's embeddings.
        """
        del embedding
        return None

    @property
    def num_updates(self) -> int:
        """How many iterations were ever taken in: `state_dict` has changed where this has."""
        return 0

    def state_dict(self) -> StateDict:
        """What it learned, for another one of its kind and shape; empty if that is nothing. Copies, not views."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, npt.NDArray[Any]]) -> None:
        """Take in what another one knew, in place of what was learned so far, when no request runs.

        From then on it scores as the other one, but for requests that the other one was in the middle of. The arrays
        are trusted: what comes from a file was checked there.
        """
