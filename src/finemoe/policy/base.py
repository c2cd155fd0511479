"""The `Policy` interface: observe routing, keep two scores per expert up to date.

`CacheManager` (engine) and the simulator's kernels turn the scores into fetches and evictions. A policy never handles
slots, links or clocks, so it can't violate an invariant of the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from finemoe.policy.cache_state import Scores
from finemoe.types import Recorded, Routed, Step

StateDict = dict[str, npt.NDArray[Any]]  # what a policy learned: arrays by name


class Policy:
    """Base class; by itself, on-demand loading with all resident experts equal.

    The arrays `retention_priority` and `prefetch_priority` are updated in place and never replaced after construction.

    Attributes:
        retention_priority: `[L, E]`; the evictable expert with the lowest is evicted first.
        prefetch_priority: `[L, E]`; when the link is idle, the absent expert with the highest is prefetched; experts at
            0 or less are never prefetched.
        margin: a prefetch takes its victim's slot only if its prefetch priority exceeds the victim's retention priority
            by more than this. `-inf` if the two scores are not comparable: then it must exceed the victim's prefetch
            priority.
        switch: a prefetch in flight is cancelled if another candidate has more than this many times its priority.
        lagging: set by the caller while newer events are queued: the policy must observe, and need not predict.
        lookahead: how many layers ahead it uses gates (`Routed.lookahead`), if it uses them.
        prefetches: whether `prefetch_priority` is ever above 0.
        needs: inputs that its predictions require, of `gates`, `lookahead` and `predictors`; without them it only
            evicts.
        uses: optional inputs, of `gates` and `lookahead`.
        substitutes: inputs of the published policy that are replaced here, and by what.
        throttles_prefetch: suspends prefetching while it does not pay (`cache_state.throttle_prefetch`).
        is_persistent: implements `state_dict` and `load_state_dict`.
        clairvoyant: needs the future: an upper bound, for the simulator only.
        compiles: the constructor takes `jit`.
        runs_async: predictions take longer than a layer should wait: the engine runs it on a thread of its own.
        parts: names that the constructor's `without` accepts, for ablations.
        settings: integer options of the constructor that may be given in the policy's name.

    Args:
        layers: `L`.
        experts: the largest `E` of any layer.
    """

    margin: float = -np.inf
    switch: float = np.inf
    lagging: bool = False
    lookahead: int = 1
    throttles_prefetch: bool = False
    prefetches: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset()
    uses: ClassVar[frozenset[str]] = frozenset()
    substitutes: ClassVar[Mapping[str, str]] = MappingProxyType({})
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
        """Learn from a request recorded earlier, e.g. of the part of a trace that fills the store."""

    def expected(self, layer: int) -> Scores | None:
        """`[E]`: the probability that the next run of `layer` needs each expert; `None` if not predicted."""
        del layer
        return None

    @property
    def num_updates(self) -> int:
        """Number of iterations learned so far; `state_dict` changes only when this does."""
        return 0

    def state_dict(self) -> StateDict:
        """What it learned, as copies, for `load_state_dict` of a policy of equal kind and shape; `{}` if nothing."""
        return {}

    def load_state_dict(self, state_dict: Mapping[str, npt.NDArray[Any]]) -> None:
        """Replace what was learned so far; call it only while no request runs.

        Afterwards it scores as the policy that `state_dict` comes from would, but for requests that were running there.
        The arrays are not validated here; `learned.file.check_arrays` does that for files.
        """
