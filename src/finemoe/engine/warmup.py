"""JIT warm-up at load: compiles the kernels of a policy and its cache before the first request.

Compilation takes seconds, once per machine; during a request, the policy's predictions would come late.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tqdm import tqdm

from finemoe.jit import kernels_cached
from finemoe.policy import CacheManager, make_policy, policy_class
from finemoe.types import DECODE, PREFILL, ExpertId, Routed, Step

_LAYERS, _EXPERTS, _HIDDEN_SIZE, _SLOTS = 3, 4, 8, 4
_DECODED_TOKENS = 3  # of each request; policies search past iterations, so there must be some
_BATCHES = ((0,), (1, 2))  # requests by batch: policies may have a kernel for one request and another for several


def warm_up(policy: str, **options: Any) -> None:
    """Runs a few short requests through a tiny cache, with events of the same types as the engine's.

    Does nothing for a policy without kernels. One with trained predictors runs with their number of layers and experts.

    Args:
        policy: a name that `make_policy` accepts.
        options: of the policy; `jit` compiles and caches its kernels.
    """
    if not policy_class(policy).compiles:
        return
    predictors = options.get("predictors")
    layers, experts = (_LAYERS, _EXPERTS) if predictors is None else (predictors.layers, predictors.experts)
    cache = CacheManager(layers, experts, _SLOTS, make_policy(policy, layers, experts, **options), jit=options["jit"])
    embedding = np.ones(_HIDDEN_SIZE, np.float32)
    iterations = [(requests, iteration) for requests in _BATCHES for iteration in range(1 + _DECODED_TOKENS)]
    disable = True if kernels_cached() else None  # None: only shown on a terminal
    for requests, iteration in tqdm(iterations, "compiling the policy, once on this machine", disable=disable):
        phase, tokens = (PREFILL, 2) if iteration == 0 else (DECODE, 1)
        cache.begin([Step(request, phase, np.ones(tokens, np.int32), embedding) for request in requests])
        gates = np.full((len(requests), experts), 1 / experts, np.float32)
        for layer in range(layers):
            expert = (iteration + layer) % experts  # a different one each time, so that there are misses
            event = Routed(layer, (expert,), gates, gates[:, None] if layer + 1 < layers else None, 1)
            _serve(cache, event, experts)
        cache.end()
    cache.begin(())


def _serve(cache: CacheManager, event: Routed, experts: int) -> None:
    """One layer, and a prefetch that fails."""
    for fetch in cache.routed(event).fetches:
        cache.landed(fetch.expert)
    used = ExpertId(event.layer, event.experts[0])
    cache.used(used)
    prefetch = cache.prefetch() or cache.prefetch_if_free(ExpertId(event.layer, (event.experts[0] + 1) % experts))
    cache.should_continue_prefetch(used if prefetch is None else prefetch.expert)
    if prefetch is not None:
        cache.failed(prefetch.expert)
