"""Has the kernels of a policy and its cache compiled before the first answer, not during it.

Compiling takes seconds, once on a machine, while what the policy should have said comes late.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tqdm import tqdm

from finemoe.jit import kernels_cached
from finemoe.policy import CacheManager, make_policy, policy_class
from finemoe.types import DECODE, PREFILL, ExpertId, Routed, Step

_LAYERS, _EXPERTS, _WIDTH, _SLOTS = 3, 4, 8, 4
_TOKENS = 3  # decoded by each request; what later ones do is searched for among what the first did
_REQUESTS = ((0,), (1, 2))  # alone, and two at a time: policies may do these in ways of their own


def warm_up(policy: str, **options: Any) -> None:
    """Runs a few short requests through a tiny cache under that policy, with events of the same types as the engine's.

    Nothing is done for one that compiles nothing. One that is made for models of one shape runs in that.

    Args:
        policy: a name of `make_policy`.
        options: of the policy; `jit` keeps what was compiled.
    """
    if not policy_class(policy).compiles:
        return
    predictors = options.get("predictors")
    layers, experts = (_LAYERS, _EXPERTS) if predictors is None else (predictors.layers, predictors.experts)
    cache = CacheManager(layers, experts, _SLOTS, make_policy(policy, layers, experts, **options), jit=options["jit"])
    embedding = np.ones(_WIDTH, np.float32)
    iterations = [(requests, iteration) for requests in _REQUESTS for iteration in range(1 + _TOKENS)]
    quiet = True if kernels_cached() else None  # None: unless this is a terminal
    for requests, iteration in tqdm(iterations, "compiling the policy, once on this machine", disable=quiet):
        phase, tokens = (PREFILL, 2) if iteration == 0 else (DECODE, 1)
        cache.begin([Step(request, phase, np.ones(tokens, np.int32), embedding) for request in requests])
        gates = np.full((len(requests), experts), 1 / experts, np.float32)
        for layer in range(layers):
            needed = (iteration + layer) % experts  # so that something is always missing
            event = Routed(layer, (needed,), gates, gates[:, None] if layer + 1 < layers else None, 1)
            _serve(cache, event, experts)
        cache.end()
    cache.begin(())


def _serve(cache: CacheManager, event: Routed, experts: int) -> None:
    """A layer, and a prefetch that is given up."""
    for needed in cache.routed(event).fetches:
        cache.landed(needed.expert)
    used = ExpertId(event.layer, event.experts[0])
    cache.used(used)
    fetch = cache.prefetch() or cache.prefetch_if_free(ExpertId(event.layer, (event.experts[0] + 1) % experts))
    cache.should_continue_prefetch(used if fetch is None else fetch.expert)
    if fetch is not None:
        cache.failed(fetch.expert)
